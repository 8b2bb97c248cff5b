"""Compare: choosing runs, what differs, who is better for sure, and what others may not see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from engine.core.artifact import HELDOUT
from jobs import comparing
from jobs.models import Artifact, Dataset, Job, Status
from tests.studio.making import RECIPE, make_data, make_result, make_run


@pytest.fixture
def ada(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def visitor(ada: User, client: Client) -> Client:
    client.force_login(ada)
    return client


def address(*jobs: Job) -> str:
    return "/runs/compare/?" + "&".join(f"run={job.pk}" for job in jobs)


def named(ada: User, name: str) -> Dataset:
    data = make_data(ada)
    Dataset.objects.filter(pk=data.pk).update(name=name)
    data.refresh_from_db()
    return data


def finished(ada: User, name: str, right: int, **settings: Any) -> Job:
    """A finished run that answered the first `right` of 40 held-out examples rightly."""
    recipe = {**RECIPE, "settings": {**RECIPE["settings"], **settings}}
    job = make_run(ada, status=Status.SUCCEEDED, done=1.0, name=name, recipe=recipe)
    make_result(job)
    rows = [{"row": n, "loss": 0.5 if n < right else 2.0, "weight": 1.0, "right": n < right, "prompt": f"text {n}",
             "output": "billing" if n < right else "login", "expected": "billing"} for n in range(40)]  # fmt: skip
    (Path(Artifact.objects.get(job=job).folder) / HELDOUT).write_text(json.dumps(rows))
    return job


@pytest.mark.usefixtures("engine_here")
def test_who_is_better_is_told_from_chance(visitor: Client, ada: User) -> None:
    """The real engine counts."""
    first, better, even = (
        finished(ada, "First", 20),
        finished(ada, "Better", 36, learning_rate=0.001),
        finished(ada, "Even", 21),
    )
    page = visitor.get(address(first, better, even)).content.decode()
    assert "better than the first by 40.0 %" in page and "no clear difference from the first" in page
    assert "90.0 %" in page and "Learning rate" in page and "0.001" in page and "Examples at a time" not in page
    assert "To 40 examples that none of them learned from." in page and page.index("text 25") < page.index("text 3<")
    answer = visitor.get(f"/api/v1/jobs/compare?jobs={first.pk},{better.pk}").json()
    assert answer["paired"] and answer["settings"] == [{"name": "settings.learning_rate", "values": [0.002, 0.001]}]
    assert answer["scores"][1]["eval_accuracy"]["value"] == 0.9 and answer["differences"][1]["eval_accuracy"]["low"] > 0


def test_without_an_engine_what_is_known_is_still_shown(
    visitor: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(timeout: float = 0) -> Any:
        raise OSError("nobody listens")

    monkeypatch.setattr(comparing, "engine", gone)
    other = make_run(ada, status=Status.RUNNING, done=0.4, name="Other", recipe={**RECIPE, "task": "instruct"})
    page = visitor.get(address(make_run(ada, status=Status.RUNNING, done=0.4, name="One"), other)).content.decode()
    assert "One" in page and "Held-out loss" in page and "They were not measured on the same" in page and "Goal" in page


def test_one_run_is_not_enough_and_too_many_are_cut(
    visitor: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "compare", lambda jobs: comparing.Comparison(jobs=list(jobs)))
    runs = [make_run(ada, status=Status.RUNNING, done=0.1, name=f"Run {n}") for n in range(9)]
    assert "Choose at least one more." in visitor.get(address(runs[0])).content.decode()
    page = visitor.get(address(*runs)).content.decode()
    assert "At most 8 runs" in page and page.count("/series") == 8
    assert "Run 0 (2)" not in page and "Nothing to compare yet" not in page
    assert visitor.get("/runs/compare/?run=nonsense").status_code == 200


def test_nothing_to_compare_says_what_to_do(visitor: Client) -> None:
    assert "Two runs that have begun are needed." in visitor.get("/runs/compare/").content.decode()
    assert visitor.get("/api/v1/jobs/compare?jobs=1,2").status_code == 422


def test_runs_of_others_do_not_exist(visitor: Client, ada: User) -> None:
    eve = User.objects.create_user("eve")
    mine, theirs = (
        make_run(ada, status=Status.RUNNING, done=0.1),
        make_run(eve, status=Status.RUNNING, done=0.1, name="Secret"),
    )
    page = visitor.get(address(mine, theirs)).content.decode()
    assert "Secret" not in page and "Choose at least one more." in page
    assert comparing.chosen(ada, [mine.pk, theirs.pk, mine.pk]) == [mine]


def test_data_are_called_by_their_name_and_never_by_a_place(
    visitor: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(timeout: float = 0) -> Any:
        raise OSError("nobody listens")

    monkeypatch.setattr(comparing, "engine", gone)
    other = {**RECIPE, "data": {"source": "file:/srv/secret/original.csv"}}
    one = make_run(ada, status=Status.RUNNING, done=0.1, dataset=named(ada, "Letters"))
    two = make_run(ada, status=Status.RUNNING, done=0.1, dataset=named(ada, "Mails"), recipe=other)
    page = visitor.get(address(one, two)).content.decode()
    assert "Letters" in page and "Mails" in page and "/srv" not in page and "original.csv" not in page
