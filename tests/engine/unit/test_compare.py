"""Results side by side: intervals, paired differences, answers; and what a run keeps of its held-out examples."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.core.artifact import HELDOUT
from engine.core.control import Control
from engine.core.events import EventLog
from engine.ops.check import require
from engine.ops.compare import MOST_ROWS, compare
from engine.ops.train import run
from tests.engine.tiny import Tiny, lay


def kept(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / HELDOUT).write_text(json.dumps(rows))
    return folder


def judged(seed: int, count: int = 200, shift: float = 0.0, share: float = 0.5) -> list[dict[str, Any]]:
    """Examples whose difficulty is shared by all results, so that pairs tell more than each alone."""
    hard, own = random.Random(0), random.Random(seed)
    rows = []
    for number in range(count):
        loss = 1.0 + hard.gauss(0, 1) + shift + own.gauss(0, 0.05)
        said = "a" if own.random() < share else "b"
        answer = {"prompt": f"p{number}", "output": said, "expected": "a", "right": said == "a"}
        rows.append({"row": number, "loss": loss, "weight": 1.0 + number % 3, **answer})
    return rows


def test_the_value_is_weighted_and_its_interval_covers_it(tmp_path: Path) -> None:
    rows = judged(1)
    (run,) = compare([kept(tmp_path / "one", rows)])["runs"]
    total = sum(row["loss"] * row["weight"] for row in rows) / sum(row["weight"] for row in rows)
    assert run["eval_loss"]["value"] == pytest.approx(total) and run["num"] == 200
    assert run["eval_loss"]["low"] < total < run["eval_loss"]["high"]
    share = sum(row["right"] for row in rows) / 200
    width = 1.96 * (share * (1 - share) / 200) ** 0.5
    assert run["eval_accuracy"]["low"] == pytest.approx(share - width, abs=0.015)
    assert run["eval_accuracy"]["high"] == pytest.approx(share + width, abs=0.015)


def test_pairs_find_a_small_difference_that_each_alone_would_hide(tmp_path: Path) -> None:
    one, other = kept(tmp_path / "one", judged(1)), kept(tmp_path / "two", judged(2, shift=0.05))
    found = compare([one, other])
    assert found["paired"] and found["differences"][0]["eval_loss"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    gap = found["differences"][1]["eval_loss"]
    assert 0.03 < gap["low"] < gap["value"] < gap["high"] < 0.07
    first, second = (run["eval_loss"] for run in found["runs"])
    assert first["high"] > second["low"], "the intervals of the two overlap widely"
    assert compare([one, other]) == found, "the same resamples every time"


def test_answers_that_differ_come_first_and_few_are_enough(tmp_path: Path) -> None:
    found = compare([kept(tmp_path / "one", judged(1, 400)), kept(tmp_path / "two", judged(2, 400))])["rows"]
    assert len(found) == MOST_ROWS
    agree = [len(set(row["outputs"])) == 1 for row in found]
    assert agree == sorted(agree) and not agree[0] and set(found[0]) == {"prompt", "expected", "outputs", "right"}


def test_other_examples_are_not_paired_and_a_result_without_any_is_empty(tmp_path: Path) -> None:
    one, other = kept(tmp_path / "one", judged(1)), kept(tmp_path / "two", judged(1, 100))
    found = compare([one, other, tmp_path / "nothing"])
    assert not found["paired"] and not found["differences"] and not found["rows"]
    assert [run["num"] for run in found["runs"]] == [200, 100, 0]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / HELDOUT).write_text("{")
    assert compare([tmp_path / "bad"])["runs"] == [{"num": 0}]


@pytest.mark.parametrize("task", ["classify", "instruct", "causal_lm", "preference", "verifiable"])
def test_a_run_keeps_what_its_scores_are_made_of(tiny: Tiny, tmp_path: Path, task: str) -> None:
    lead = {"preference": [("dpo", {})], "verifiable": [("grpo", {"k": 2})]}.get(task, [])
    recipe = tiny.recipe([("lora", {"r": 2}), *lead], task=task, max_steps=2, epochs=1)
    folder = lay(tmp_path, recipe)
    log = EventLog(folder)
    assert run(require(recipe), folder, log, Control(folder), nested=True).reason == "completed"
    log.close()
    rows = json.loads((folder / "artifact" / HELDOUT).read_text())
    metrics = json.loads((folder / "artifact" / "artifact.json").read_text())["metrics"]
    (scores,) = compare([folder / "artifact"])["runs"]
    assert len(rows) == scores["num"] > 0
    assert scores["eval_loss"]["value"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert ("eval_accuracy" in scores) == ("eval_accuracy" in metrics)
    if "eval_accuracy" in metrics:
        assert scores["eval_accuracy"]["value"] == pytest.approx(metrics["eval_accuracy"])
