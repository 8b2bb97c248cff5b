"""Searches on the pages: the live table of trials, the picture of all settings beside each other, and how much each setting mattered."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.folder import run_folder
from jobs import overrides
from jobs.ingest import Ingester
from jobs.models import Job, ModelEntry, Status
from jobs.places import job_folder
from studio.pages.report import report_of
from studio.pages.trials import HEIGHT, live_trials, parallel
from tests.engine.tiny import Tiny, lay
from tests.studio.conftest import Visitor
from tests.studio.making import make_data, make_model, make_result, make_run

RATE = "settings.learning_rate"


def rows() -> list[dict[str, Any]]:
    return [
        {"trial": n, RATE: 10.0 ** -(n + 1), "lora.r": (4, 8)[n % 2], "score": None if n == 3 else -float(n)}
        for n in range(9)
    ]


def event(number: int, state: str, score: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "trial": number,
        "state": state,
        "done": 3,
        "total": 9,
        "score": score,
        "values": {RATE: 0.01},
        "message": "",
        **more,
    }


def test_one_axis_a_setting_and_one_line_a_trial_with_a_score() -> None:
    drawn = parallel(rows(), [RATE, "lora.r"], "score")
    assert drawn is not None
    assert [axis["title"] for axis in drawn["axes"]] == ["Learning rate", "Lora r", "Score"]
    assert len(drawn["lines"]) == 8 and drawn["lines"][-1]["shade"] == "best" and "Trial 0" in drawn["best"]
    assert [tick["text"] for tick in drawn["axes"][1]["ticks"]] == ["4", "8"], "few values stand evenly"
    heights = [float(pair.split(",")[1]) for line in drawn["lines"] for pair in line["points"].split()]
    assert all(0 < height < HEIGHT for height in heights)
    logged = sorted({float(line["points"].split()[0].split(",")[1]) for line in drawn["lines"]})
    assert all(b - a > 20 for a, b in itertools.pairwise(logged)), "a wide range is walked in factors"


@pytest.mark.parametrize(
    ("table", "knobs", "score"),
    [([], ["x"], "score"), (rows(), [], "score"), (rows(), None, None), (rows(), ["no"], "score"), (rows()[:1], [RATE], "score"), (rows(), RATE, "score")],
)  # fmt: skip
def test_nothing_is_drawn_where_there_is_nothing_to_draw(table: Any, knobs: Any, score: Any) -> None:
    assert parallel(table, knobs, score) is None


def test_the_live_table_takes_the_newest_word_of_each_trial_and_marks_the_best() -> None:
    told = [
        event(1, "running", -2.0),
        event(0, "stopped", -1.0, message="Why."),
        event(2, "failed"),
        event(1, "waiting", -9.0),
    ]
    shown = live_trials(list(overrides.newest(told).values()))
    assert shown is not None
    assert [(row["trial"], row["state"], row["best"]) for row in shown["rows"]] == [
        (1, "running", False),
        (0, "stopped", True),
        (2, "failed", False),
    ]
    assert shown["over"] == 2 and shown["columns"] == ["Learning rate"] and shown["rows"][2]["score"] == "–"
    assert live_trials([]) is None and not overrides.newest([{"trial": "x"}])


def test_a_real_search_tells_its_trials_while_it_runs_and_draws_them_afterwards(
    ada: Visitor, starters: ModelEntry, tmp_path: Path
) -> None:
    tiny = Tiny(tmp_path)
    body = {
        **tiny.inputs("causal_lm"),
        "operation": "search",
        "methods": [{"slug": "random-search", "params": {"trials": 6, "space": "learning_rate=1e-4..1e-1, lora.r=2|4"}}, {"slug": "lora"}],
        "settings": {"max_steps": 3, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2, "evaluations": 1, "precision": "fp32"},
    }  # fmt: skip
    recipe = require(parse_recipe(body)).recipe
    job = make_run(ada.user, status=Status.RUNNING, done=0.5, dataset=make_data(), model=make_model())
    Job.objects.filter(pk=job.pk).update(recipe=recipe.model_dump(mode="json"))
    folder = lay(tmp_path / "job", recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    with (folder / "events.jsonl").open("rb") as log:
        told = [line for line in log if b'"kind":"trial"' in line]
    assert told
    own = job_folder(job.pk) / "events.jsonl"
    last = len(own.read_bytes().splitlines())
    with own.open("ab") as log:
        for number, line in enumerate(told, start=1):
            log.write(re.sub(rb'"seq":\d+', b'"seq":%d' % (last + number), line, count=1))
    job.refresh_from_db()
    Ingester(job, own.parent, job.lease_epoch).drain()
    page = ada.read(f"/runs/{job.pk}/")
    assert 'id="trials-title"' in page and page.count('class="trial is-finished"') == 6 and "best so far" in page
    assert "Learning rate" in page and "3 of 3" in page
    result = make_result(job)
    result.description = json.loads((folder / "artifact" / "artifact.json").read_text())
    result.save()
    page = ada.read(f"/results/{result.pk}/")
    assert page.count('<polyline class="shade-') == 5 and page.count('<polyline class="best"') == 1
    assert "What mattered" in page and "The whole table" in page
    assert report_of(result.description)["importance"][0]["share"] > 0  # type: ignore[index]
