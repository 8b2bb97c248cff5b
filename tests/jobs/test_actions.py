"""What a person may do with a job, when, and the sentence when not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db.models import F
from huey.contrib.djhuey import HUEY

from engine.core.errors import Fault, RecipeError
from engine.core.events import EventLog
from jobs import actions
from jobs.actions import Again, Cancel, Create, Pause, Purge, Resume, StopAndKeep, available
from jobs.ingest import Ingester
from jobs.lifecycle import LEGAL, transition
from jobs.models import TERMINAL, Artifact, Dataset, Event, Job, ModelEntry, Status
from jobs.places import job_folder
from jobs.retention import prune, prune_ended
from tests.jobs.conftest import MakeJob

POSSIBLE = {
    Status.QUEUED: {"cancel", "again"},
    Status.STARTING: {"cancel", "pause", "stop", "again"},
    Status.RUNNING: {"cancel", "pause", "stop", "again"},
    Status.STOPPING: {"cancel", "stop", "again"},  # asked to pause so far: a stronger wish may follow
    Status.PAUSED: {"cancel", "resume", "again"},
    Status.LOST: {"again"},
    Status.SUCCEEDED: {"again", "delete"},
    Status.FAILED: {"again", "delete"},
    Status.CANCELLED: {"again", "delete"},
}


def brought_to(job: Job, goal: Status) -> Job:
    """Walk the shortest legal way."""
    ways: dict[Status, list[Status]] = {Status.QUEUED: []}
    todo = [Status.QUEUED]
    while todo:
        here = todo.pop(0)
        for there in LEGAL[here]:
            if there not in ways:
                ways[there] = [*ways[here], there]
                todo.append(there)
    for step in ways[goal]:
        changes: dict[str, Any] = {"stop_request": "pause"} if step is Status.STOPPING else {}
        transition(job, step, "test", {Status.SUCCEEDED: "completed", Status.FAILED: "bug"}.get(step, ""), **changes)
    return job


@pytest.mark.parametrize("status", list(Status))
def test_each_state_offers_what_it_can_and_says_why_not_else(make_job: MakeJob, person: User, status: Status) -> None:
    job = brought_to(make_job(), status)
    offered = available(job, person)
    assert {slug for slug, sentence in offered.items() if sentence is None} == POSSIBLE[status]
    for slug, sentence in offered.items():
        assert sentence is None or (sentence[0].isupper() and sentence.endswith(".")), slug
    before = Job.objects.get(pk=job.pk)
    for action in (Pause, Resume, StopAndKeep, Cancel, Purge):
        if action.slug not in POSSIBLE[status]:
            with pytest.raises(actions.ActionRefused) as refusal:
                action(job).execute(person)
            assert str(refusal.value) == offered[action.slug]
    assert Job.objects.get(pk=job.pk).last_seq == before.last_seq


def test_somebody_elses_job_is_left_alone_and_staff_may(make_job: MakeJob) -> None:
    eve, root = User.objects.create_user("eve"), User.objects.create_user("root", is_staff=True)
    job = make_job()
    assert set(available(job, eve).values()) == {"This job belongs to somebody else."}
    with pytest.raises(actions.ActionRefused) as refusal:
        Cancel(job).execute(eve)
    assert refusal.value.code == "forbidden"
    assert Cancel(job).execute(root).status == Status.CANCELLED
    assert Event.objects.filter(job=job).order_by("seq").last().data["by"] == "root"  # type: ignore[union-attr]


def test_a_stronger_wish_replaces_a_weaker_one(make_job: MakeJob, person: User) -> None:
    job = brought_to(make_job(), Status.RUNNING)
    assert Pause(job).execute(person).stop_request == "pause"
    assert StopAndKeep(job).execute(person).stop_request == "stop"
    assert Cancel(job).execute(person).stop_request == "cancel"
    with pytest.raises(actions.ActionRefused, match="stopping already"):
        Pause(job).execute(person)
    assert job.status == Status.STOPPING


def test_who_is_overtaken_looks_again(make_job: MakeJob, person: User) -> None:
    """The worker claims the job in the very moment in which a person cancels it."""
    job = make_job()
    cancel = Cancel(job)
    check = cancel.check

    def claimed_meanwhile(user: Any) -> str | None:
        answer = check(user)
        if Job.objects.filter(pk=job.pk, status=Status.QUEUED).exists():
            transition(Job.objects.get(pk=job.pk), Status.STARTING, "worker", lease_epoch=F("lease_epoch") + 1)
        return answer

    cancel.check = claimed_meanwhile  # type: ignore[method-assign]
    assert cancel.execute(person).status == Status.STOPPING and job.stop_request == "cancel"


@pytest.mark.django_db(transaction=True)
def test_a_purge_takes_everything_along(make_job: MakeJob, person: User, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 3).close()
    brought_to(job, Status.SUCCEEDED)
    Artifact.objects.create(job=job, folder="x", content_id="0" * 64)
    folder = job_folder(job.pk)
    Purge(job).execute(person)
    assert not folder.exists()
    assert not (Job.objects.exists() or Event.objects.exists() or Artifact.objects.exists())


# ── creating ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Answers:
    """The engine's end of `check`: what it was asked, and what it says."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.faults: list[dict[str, str]] = []

    def call(self, name: str, **request: Any) -> dict[str, Any]:
        assert name == "check"
        self.asked.append(request["recipe"])
        return {
            "recipe": {**request["recipe"], "settings": {"seed": 17}},
            "fingerprint": "a" * 64,
            "faults": self.faults,
            "suggestions": [{"where": "settings.seed", "value": 17, "reason": "It is prime."}],
            "estimate": {"total_steps": 50},
        }


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers()
    monkeypatch.setattr(actions, "engine", lambda: made)
    return made


@pytest.fixture
def data(person: User, tmp_path: Any) -> Dataset:
    path = tmp_path / "original.csv"
    path.write_text("text,label\na,b\n")
    return Dataset.objects.create(
        owner=person,
        name="Mine",
        path=str(path),
        format="csv",
        sha256="b" * 64,
        shape="classification",
        mapping={"text": "text", "label": "label"},
    )


@pytest.fixture
def model(db: None) -> ModelEntry:
    return ModelEntry.objects.create(name="MiniLM", source="starter:minilm-l6")


def recipe_of(data: Dataset, model: ModelEntry) -> dict[str, Any]:
    return {
        "task": "classify",
        "data": {"source": f"dataset:{data.pk}"},
        "model": {"source": f"model:{model.pk}"},
        "methods": [{"slug": "paca"}],
    }


@pytest.mark.django_db(transaction=True)
def test_a_new_job_names_what_the_person_chose_and_what_the_engine_reads(
    person: User, data: Dataset, model: ModelEntry, answers: Answers
) -> None:
    HUEY.storage.flush_all()
    job = Create(owner=person, recipe=recipe_of(data, model)).execute(person)
    assert job.status == Status.QUEUED and job.name == "Mine on MiniLM" and job.total_steps == 50
    assert (job.dataset, job.model) == (data, model)
    assert answers.asked[0]["data"] == {
        "source": f"file:{data.path}",
        "columns": {"text": "text", "label": "label"},
        "sha256": "b" * 64,
    }
    assert answers.asked[0]["model"] == {"source": "starter:minilm-l6"}
    assert job.request["data"]["source"] == f"dataset:{data.pk}", "what was asked for stays readable"
    assert job.recipe["settings"] == {"seed": 17} and job.suggestions[0]["reason"] == "It is prime."
    assert [event.data["to"] for event in Event.objects.filter(job=job)] == ["queued"]
    assert HUEY.storage.queue_size() == 1, "the queue was told after the commit"
    again = Again(job).execute(person)
    assert again.again_of == job and again.request == {**job.request, "name": job.name} and again.pk != job.pk


@pytest.mark.parametrize(("where", "source"), [
    ("data.source", "file:/etc/passwd"), ("data.source", "folder:/etc"), ("data.source", ""), ("data.source", "hub:a/b"),
    ("model.source", "folder:/etc"), ("model.source", "file:/etc/passwd"), ("model.source", ""), ("model.source", "hub:a/b"),
    ("data.source", "dataset:nonsense"), ("model.source", "artifact:nonsense"),
    ("model.source", "model:00000000-0000-0000-0000-000000000000"),
])  # fmt: skip
def test_a_path_of_this_machine_is_refused(
    person: User, data: Dataset, model: ModelEntry, answers: Answers, where: str, source: str
) -> None:
    recipe = recipe_of(data, model)
    recipe[where.partition(".")[0]]["source"] = source
    with pytest.raises(RecipeError) as refusal:
        Create(owner=person, recipe=recipe).execute(person)
    assert [fault.where for fault in refusal.value.faults] == [where]
    assert not answers.asked and not Job.objects.exists()


def test_what_belongs_to_somebody_else_does_not_exist(
    data: Dataset, model: ModelEntry, answers: Answers, make_job: MakeJob
) -> None:
    eve = User.objects.create_user("eve")
    foreign = Artifact.objects.create(job=make_job(), folder="/nowhere", content_id="c" * 64)
    recipe = recipe_of(data, model)
    recipe["model"]["source"] = f"artifact:{foreign.pk}"
    with pytest.raises(RecipeError) as refusal:
        Create(owner=eve, recipe=recipe).execute(eve)
    assert {fault.code for fault in refusal.value.faults} == {"unknown_dataset", "unknown_artifact"}


def test_every_fault_of_the_engine_is_told(person: User, data: Dataset, model: ModelEntry, answers: Answers) -> None:
    answers.faults = [
        Fault(where=f"methods[{n}]", what="No.", why="Because.", way_out="Else.", code="no").to_dict() for n in range(2)
    ]
    with pytest.raises(RecipeError) as refusal:
        Create(owner=person, recipe=recipe_of(data, model)).execute(person)
    assert len(refusal.value.faults) == 2 and not Job.objects.exists()


def test_one_key_is_one_job(person: User, data: Dataset, model: ModelEntry, answers: Answers) -> None:
    recipe = recipe_of(data, model)
    first = Create(owner=person, recipe=recipe, idempotency_key="k").execute(person)
    assert Create(owner=person, recipe=recipe, idempotency_key="k").execute(person) == first
    assert Job.objects.count() == 1
    with pytest.raises(actions.ActionRefused) as refusal:
        Create(owner=person, recipe={**recipe, "methods": []}, idempotency_key="k").execute(person)
    assert refusal.value.code == "key_reused"


def test_nobody_fills_the_queue_alone(
    person: User, data: Dataset, model: ModelEntry, answers: Answers, settings: Any
) -> None:
    settings.BONSAI_MAX_WAITING_JOBS = 2
    for _ in range(2):
        Create(owner=person, recipe=recipe_of(data, model)).execute(person)
    with pytest.raises(actions.ActionRefused, match="2 jobs waiting"):
        Create(owner=person, recipe=recipe_of(data, model)).execute(person)


@pytest.mark.parametrize("recipe", [[], "x", {"data": 3}, {"data": {}, "model": []}])
def test_what_is_no_recipe_is_refused(person: User, recipe: Any) -> None:
    with pytest.raises(RecipeError):
        Create(owner=person, recipe=recipe).resolve()


# ── keeping ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_old_events_of_ended_jobs_go_and_numbers_stay(
    make_job: MakeJob, write_log: Callable[..., EventLog], settings: Any
) -> None:
    settings.BONSAI_KEEP_EVENTS = 10
    ended, running = make_job(), make_job()
    for job in (ended, running):
        write_log(job, 50).close()
        Ingester(job, job_folder(job.pk), 0).drain()
        job.refresh_from_db()
    brought_to(ended, Status.CANCELLED)
    assert ended.status in TERMINAL and prune_ended() == ended.last_seq - 10
    ended.refresh_from_db()
    kept = list(Event.objects.filter(job=ended).order_by("seq").values_list("seq", flat=True))
    assert kept == list(range(ended.first_seq, ended.last_seq + 1)) and len(kept) == 10
    assert Event.objects.filter(job=running).count() == 51
    assert prune(running, 100) == 0
