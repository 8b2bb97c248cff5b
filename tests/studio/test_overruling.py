"""Keeping and stopping single trials of a running search: who may, when, and the sentence when not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.core.overrides import read_overrides
from jobs import actions, overrides
from jobs.models import Event, Job, ModelEntry, Status
from jobs.places import job_folder
from tests.jobs import api_kit as kit
from tests.jobs.api_kit import Caller
from tests.studio.conftest import Visitor

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("engine_here")]
SEARCH = {**kit.RECIPE, "operation": "search", "methods": [{"slug": "successive-halving", "params": {}}, {"slug": "lora", "params": {}}]}  # fmt: skip


def a_search(owner: Any, status: Status = Status.RUNNING, recipe: Any = SEARCH) -> Job:
    """A search with four trials: one learns, one is stopped, one has reached its end, one broke down."""
    job = kit.job(owner, status, num_events=1)
    job_folder(job.pk).mkdir(parents=True, exist_ok=True)
    Job.objects.filter(pk=job.pk).update(recipe=recipe, last_seq=6)
    states = ["waiting", "running", "stopped", "finished", "failed"]
    for seq, state in enumerate(states, start=2):
        values = {"settings.learning_rate": 0.01}
        data = {"trial": max(0, seq - 3), "state": state, "done": 3, "total": 9, "score": -1.0, "values": values, "message": "Why."}  # fmt: skip
        Event.objects.create(job=job, seq=seq, log_seq=seq, kind="trial", step=seq, time=1.0, data=data)
    job.refresh_from_db()
    return job


def word(answer: Any, status: int) -> str:
    return str(kit.problem(answer, status)["faults"][0]["why"])


def test_what_is_possible_for_each_trial_and_what_waits_to_be_taken_up() -> None:
    ada = kit.caller("ada")
    job = a_search(ada.user)
    shown = {row["trial"]: row for row in ada.get(f"jobs/{job.pk}/trials").json()["trials"]}
    assert {number: row["possible"] for number, row in shown.items()} == {
        0: ["keep", "stop"],
        1: ["keep"],
        2: [],
        3: [],
    }
    answer = ada.post(f"jobs/{job.pk}/trials/1/keep")
    assert answer.status_code == 202 and answer["Location"] == f"/api/v1/jobs/{job.pk}/trials"
    row = answer.json()["trials"][1]
    assert row["asked"] == {"verdict": "keep", "by": "ada"} and row["possible"] == []
    assert ada.post(f"jobs/{job.pk}/trials/1/keep").status_code == 202
    assert [(made.trial, made.verdict, made.by) for made in read_overrides(job_folder(job.pk))] == [(1, "keep", "ada")]
    Event.objects.create(job=job, seq=7, log_seq=7, kind="override", step=9, time=1.0, data={"number": 1, "trial": 1, "verdict": "keep", "by": "ada"})  # fmt: skip
    assert ada.get(f"jobs/{job.pk}/trials").json()["trials"][1]["asked"] is None
    assert ada.post(f"jobs/{job.pk}/trials/0/stop").status_code == 202
    assert ada.post(f"jobs/{job.pk}/trials/0/keep").status_code == 202, "the last word counts"
    assert [made.number for made in read_overrides(job_folder(job.pk))] == [1, 2, 3]


def test_what_is_not_possible_is_refused_in_a_sentence() -> None:
    ada = kit.caller("ada")
    job = a_search(ada.user)
    address = f"jobs/{job.pk}/trials"
    assert word(ada.post(f"{address}/7/keep"), 404) == "Trial 7 has not begun, or there is none with this number."
    assert word(ada.post(f"{address}/1/stop"), 409) == "Trial 1 is stopped already."
    assert word(ada.post(f"{address}/2/stop"), 409) == "Trial 2 has reached its end already."
    assert word(ada.post(f"{address}/3/keep"), 409) == "Trial 3 broke down and cannot go on."
    for path in (f"{address}/1/promote", f"{address}/-1/keep", f"{address}/one/keep"):
        assert ada.post(path).status_code in (404, 422)
    for status, says in ((Status.SUCCEEDED, "ended"), (Status.CANCELLED, "ended"), (Status.STOPPING, "stopping")):
        over = a_search(ada.user, status)
        assert says in word(ada.post(f"jobs/{over.pk}/trials/0/stop"), 409)
    assert "no single trial" in word(ada.post(f"jobs/{kit.job(ada.user, Status.RUNNING).pk}/trials/0/stop"), 409)
    assert not read_overrides(job_folder(job.pk))


def test_a_search_without_a_rule_offers_a_stop_alone() -> None:
    ada = kit.caller("ada")
    job = a_search(ada.user, recipe={**SEARCH, "methods": [{"slug": "random-search"}, {"slug": "lora"}]})
    assert ada.get(f"jobs/{job.pk}/trials").json()["trials"][0]["possible"] == ["stop"]
    assert word(ada.post(f"jobs/{job.pk}/trials/0/keep"), 409) == "In this run no single trial can be kept by a person."


def test_a_paused_search_may_be_told_and_a_stranger_may_not() -> None:
    ada, eve, chief = kit.caller("ada"), kit.caller("eve"), kit.caller("chief", staff=True)
    job = a_search(ada.user, Status.PAUSED)
    kit.problem(eve.post(f"jobs/{job.pk}/trials/1/keep"), 404)
    kit.problem(Caller(None).post(f"jobs/{job.pk}/trials/1/keep"), 401)
    assert overrides.Overrule(job=job, trial=1, verdict="keep").check(eve.user) == "This job belongs to somebody else."  # type: ignore[arg-type]
    assert chief.post(f"jobs/{job.pk}/trials/1/keep").status_code == 202
    assert read_overrides(job_folder(job.pk))[0].by == "chief"


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_live_table_has_a_button_for_what_is_possible_and_says_what_was_asked(ada: Visitor) -> None:
    job = a_search(ada.user)
    page = ada.read(f"/runs/{job.pk}/")
    buttons = re.findall(r'<button id="(keep|stop)-(\d)" class="[^"]*" aria-label="([^"]*)"', page)
    assert buttons == [
        ("keep", "0", "Keep trial 0"),
        ("stop", "0", "Stop trial 0"),
        ("keep", "1", "Keep trial 1"),
    ]
    answer = ada.post(f"/runs/{job.pk}/trials/1/keep/")
    assert answer.status_code == 302 and answer["Location"].startswith(f"/runs/{job.pk}/")
    page = ada.read(f"/runs/{job.pk}/")
    assert "Trial 1 is kept: it goes on after the slice that is under way." in page
    assert "ada has said to keep this trial" in page and 'id="keep-1"' not in page
    assert ada.get(f"/runs/{job.pk}/trials/1/keep/").status_code == 302, "a look changes nothing"
    assert ada.post(f"/runs/{job.pk}/trials/1/praise/").status_code == 404
    ada.post(f"/runs/{job.pk}/trials/2/stop/")
    assert "Trial 2 has reached its end already." in ada.read(f"/runs/{job.pk}/")
    assert len(read_overrides(job_folder(job.pk))) == 1


def test_what_was_taken_up_stands_in_the_log_and_strangers_see_nothing(ada: Visitor, bob: Visitor) -> None:
    job = a_search(ada.user)
    told = {
        "number": 1,
        "trial": 1,
        "verdict": "keep",
        "by": "ada",
        "taken": True,
        "message": "Trial 1 is kept by you (ada): it goes on.",
    }
    Event.objects.create(job=job, seq=7, log_seq=7, kind="override", step=9, time=1.0, data=told)
    Job.objects.filter(pk=job.pk).update(last_seq=7)
    assert "Trial 1 is kept by you (ada)" in ada.read(f"/runs/{job.pk}/")
    assert bob.post(f"/runs/{job.pk}/trials/1/stop/").status_code == 404


def test_a_search_that_is_over_and_a_training_have_no_buttons(ada: Visitor) -> None:
    page = ada.read(f"/runs/{a_search(ada.user, Status.CANCELLED).pk}/")
    assert 'id="trials-title"' in page and "Keep trial" not in page and "Stop trial" not in page
    assert "trials-title" not in ada.read(f"/runs/{kit.job(ada.user, Status.RUNNING).pk}/")


def test_a_way_out_that_was_found_in_a_trial_starts_the_search_again_with_it(
    ada: Visitor, starters: ModelEntry
) -> None:
    recipe = {
        "operation": "search",
        "task": "classify",
        "model": {"source": starters.source},
        "data": {"source": "starter:customer-messages"},
        "methods": [{"slug": "random-search", "params": {"space": "learning_rate=1e-4..1"}}, {"slug": "lora"}],
        "settings": {"max_steps": 4},
    }
    job = actions.Create(owner=ada.user, recipe=recipe).execute(ada.user)
    Job.objects.filter(pk=job.pk).update(status=Status.RUNNING, last_seq=2)
    remedy = {
        "title": "Start the search again with learning rate from 0.0001 to 0.01",
        "start": "beginning",
        "changes": {"methods.0.params.space": "learning_rate=0.0001..0.01"},
    }
    signal = {"action": "warn", "rule": "divergence", "message": "It diverges.", "numbers": {}, "remedy": remedy}
    Event.objects.create(job=job, seq=2, log_seq=2, kind="signal", step=3, time=1.0, data=signal)
    assert str(remedy["title"]) in ada.read(f"/runs/{job.pk}/")
    assert ada.post(f"/runs/{job.pk}/fork/", {"remedy": "2"}).status_code == 302
    made = Job.objects.get(again_of=job)
    assert made.recipe["operation"] == "search" and made.fork_step is None
    assert [ref["slug"] for ref in made.recipe["methods"]][:2] == ["random-search", "lora"]
    assert made.recipe["methods"][0]["params"]["space"] == "learning_rate=0.0001..0.01"
