"""Runs on their pages: every state, the list, what a person may do, and what others may not see."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from jobs import catalogue
from jobs.models import Event, Job, Status
from studio.pages import telling
from tests.studio.making import RECIPE, make_data, make_model, make_result, make_run

HOSTILE = '<script>alert("x")</script>'
CARDS: dict[str, Any] = {
    "tasks": [{"name": "classify", "title": "Sort texts into topics"}],
    "methods": [
        {"slug": "paca", "title": "PaCA", "slots": ["parametrization"], "schema": {}},
        {
            "slug": "early-dynamics-stopping",
            "title": "Early signals",
            "slots": ["watcher"],
            "schema": {"properties": {"first_window": {"default": 0.2}}},
        },
    ],
}


@pytest.fixture(autouse=True)
def engine_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine's catalogue says of the two methods here, without starting an engine for each test."""
    monkeypatch.setattr(telling, "catalogue", lambda: CARDS)


@pytest.fixture
def ada(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def visitor(ada: User, client: Client) -> Client:
    client.force_login(ada)
    return client


def html(client: Client, address: str, **extra: Any) -> str:
    answer = client.get(address, **extra)
    assert answer.status_code == 200, address
    return answer.content.decode()


FAULT = {
    "where": "settings.learning_rate",
    "code": "not_finite",
    "what": "The loss became infinite.",
    "why": "The rate is too high.",
    "way_out": "Try a smaller one.",
}
STATES = {
    Status.QUEUED: ("Will learn to sort texts into topics with PaCA on MiniLM", "Next in line"),
    Status.STARTING: ("About to learn to", "Loads the model"),
    Status.RUNNING: ("Learning to sort texts into topics with PaCA on MiniLM", "about 2 minutes left, looks healthy."),
    Status.STOPPING: ("42 % done. Stops at the next step", "Cancel"),
    Status.PAUSED: ("Everything is saved, and it goes on from exactly here.", "Resume"),
    Status.LOST: ("The run was interrupted.", "goes on by itself"),
    Status.SUCCEEDED: ("Learned to sort texts into topics", "Again with changes"),
    Status.FAILED: ("Tried to learn to", "The rate is too high."),
    Status.CANCELLED: ("Began to learn to", "There is no result"),
}


@pytest.mark.parametrize("status", list(Status))
def test_every_state_is_told(visitor: Client, ada: User, status: Status) -> None:
    message = {
        Status.STARTING: "Loads the model and the data.",
        Status.STOPPING: "Stops at the next step and exports.",
    }.get(status, "")
    done = {Status.QUEUED: 0.0, Status.STARTING: 0.0, Status.SUCCEEDED: 1.0}.get(status, 0.425)
    faults = [FAULT] if status is Status.FAILED else []
    job = make_run(
        ada,
        status=status,
        done=done,
        message=message,
        faults=faults,
        dataset=make_data(),
        model=make_model(),
        stop_request="stop" if status is Status.STOPPING else "",
    )
    if status is Status.STARTING:
        Event.objects.filter(job=job, kind__in=("state", "metric", "evaluation")).delete()
    text = html(visitor, f"/runs/{job.pk}/")
    for words in STATES[status]:
        assert words in text, words
    assert "Traceback" not in text


def test_the_title_carries_the_progress(visitor: Client, ada: User) -> None:
    job = make_run(ada, status=Status.RUNNING, done=0.425)
    assert "<title>42 % · Sort customer messages" in html(visitor, f"/runs/{job.pk}/")


def test_a_finished_run_leads_to_its_result(visitor: Client, ada: User) -> None:
    job = make_run(ada, status=Status.SUCCEEDED, done=1.0)
    artifact = make_result(job)
    text = html(visitor, f"/runs/{job.pk}/")
    assert f"/results/{artifact.pk}/" in text
    assert "Right 9 times of 10 on new examples." in text


def test_parts_are_those_of_the_page(visitor: Client, ada: User) -> None:
    job = make_run(ada, status=Status.RUNNING, done=0.3)
    parts = html(visitor, f"/runs/{job.pk}/parts/")
    whole = html(visitor, f"/runs/{job.pk}/")
    for name in ("head", "strip", "notice", "signals", "numbers", "samples", "table", "log", "machine"):
        key = parts.split(f'data-part="{name}" data-key="')[1][:8]
        assert f'data-part="{name}" data-key="{key}"' in whole, name
    assert 'data-title="30 % · Sort customer messages · Bonsai Studio"' in parts


def test_a_key_changes_with_its_part_alone(visitor: Client, ada: User) -> None:
    def keys(job: Job) -> dict[str, str]:
        pieces = html(visitor, f"/runs/{job.pk}/parts/").split('data-part="')[1:]
        return {piece.split('"')[0]: piece.split('data-key="')[1][:8] for piece in pieces}

    job = make_run(ada, status=Status.RUNNING, done=0.3)
    before = keys(job)
    assert keys(job) == before
    Job.objects.filter(pk=job.pk).update(done_steps=80, eta_seconds=100.0)
    after = keys(job)
    assert {name for name in before if before[name] != after[name]} == {"head", "strip", "numbers", "table"}


def test_the_page_reads_the_database_a_fixed_number_of_times(visitor: Client, ada: User) -> None:
    short, long = (
        make_run(ada, status=Status.RUNNING, done=done, total=total) for done, total in ((0.1, 40), (0.9, 400))
    )
    counts = []
    for job in (short, long):
        html(visitor, f"/runs/{job.pk}/")  # reads the curve once
        with CaptureQueriesContext(connection) as queries:
            html(visitor, f"/runs/{job.pk}/")
        with CaptureQueriesContext(connection) as again:
            html(visitor, f"/runs/{job.pk}/parts/")
        counts.append((len(queries), len(again)))
    assert counts[0] == counts[1]
    assert counts[0][0] <= 12 and counts[0][1] <= 9, counts


def test_the_list_reads_the_database_as_often_for_many_runs(visitor: Client, ada: User) -> None:
    data, model = make_data(), make_model()
    counts = []
    for num in (2, 12):
        for _ in range(num):
            make_run(ada, status=Status.CANCELLED, done=0.5, dataset=data, model=model)
        with CaptureQueriesContext(connection) as queries:
            html(visitor, "/runs/")
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 7


def test_what_others_wrote_never_becomes_markup(visitor: Client, ada: User) -> None:
    data = make_data()
    data.name = HOSTILE
    data.save()
    job = make_run(ada, status=Status.FAILED, done=1.0, name=HOSTILE, message=HOSTILE, dataset=data, warn=HOSTILE,
                   faults=[{**FAULT, "what": HOSTILE, "why": HOSTILE, "way_out": HOSTILE}])  # fmt: skip
    for kind, data_of_event in (
        ("sample", {"prompt": HOSTILE, "output": HOSTILE, "expected": HOSTILE}),
        ("log", {"level": "warning", "message": HOSTILE}),
        ("signal", {"action": "warn", "rule": "x", "message": HOSTILE}),
        ("child", {"device_name": HOSTILE, "attempt": 2}),
    ):
        Job.objects.filter(pk=job.pk).update(last_seq=job.last_seq + 1)
        job.refresh_from_db()
        Event.objects.create(job=job, seq=job.last_seq, kind=kind, step=999, time=1.8e9, data=data_of_event)
    for address in (f"/runs/{job.pk}/", f"/runs/{job.pk}/parts/", "/runs/", "/runs/?q=%3Cscript%3E"):
        text = html(visitor, address)
        assert "<script>alert" not in text, address
        assert "&lt;script&gt;alert" in text, address


# -- what a person may do ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "status", "after"),
    [
        ("pause", Status.RUNNING, "pause"),
        ("stop", Status.RUNNING, "stop"),
        ("resume", Status.PAUSED, Status.QUEUED),
    ],
)
def test_actions_are_posted(visitor: Client, ada: User, action: str, status: Status, after: str) -> None:
    job = make_run(ada, status=status, done=0.4)
    answer = visitor.post(f"/runs/{job.pk}/{action}/")
    assert answer.status_code == 302 and answer["Location"] == f"/runs/{job.pk}/"
    job.refresh_from_db()
    assert after in (job.status, job.stop_request)


def test_cancel_asks_first_and_then_cancels(visitor: Client, ada: User) -> None:
    job = make_run(ada)
    asked = visitor.post(f"/runs/{job.pk}/cancel/")
    assert asked.status_code == 200 and "Let it go on" in asked.content.decode()
    job.refresh_from_db()
    assert job.status == Status.QUEUED
    visitor.post(f"/runs/{job.pk}/cancel/", {"sure": "yes"})
    job.refresh_from_db()
    assert job.status == Status.CANCELLED


def test_delete_asks_first_and_leads_to_the_list(visitor: Client, ada: User) -> None:
    job = make_run(ada, status=Status.CANCELLED, done=0.2)
    assert "cannot be undone" in visitor.post(f"/runs/{job.pk}/delete/").content.decode()
    answer = visitor.post(f"/runs/{job.pk}/delete/", {"sure": "yes"})
    assert answer["Location"] == "/runs/" and not Job.objects.filter(pk=job.pk).exists()


def test_what_is_impossible_is_said_in_a_sentence(visitor: Client, ada: User) -> None:
    job = make_run(ada, status=Status.CANCELLED, done=0.2)
    answer = visitor.post(f"/runs/{job.pk}/pause/", follow=True)
    assert "The job has been cancelled already." in answer.content.decode()


def test_looking_at_an_action_does_nothing(visitor: Client, ada: User) -> None:
    job = make_run(ada)
    assert visitor.get(f"/runs/{job.pk}/cancel/")["Location"] == f"/runs/{job.pk}/"
    assert visitor.post(f"/runs/{job.pk}/explode/").status_code == 404
    job.refresh_from_db()
    assert job.status == Status.QUEUED


def test_an_action_needs_the_token_of_the_page(ada: User) -> None:
    job = make_run(ada)
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(ada)
    assert strict.post(f"/runs/{job.pk}/cancel/", {"sure": "yes"}).status_code == 403
    job.refresh_from_db()
    assert job.status == Status.QUEUED


def test_somebody_elses_run_does_not_exist(visitor: Client, db: None) -> None:
    job = make_run(User.objects.create_user("eve"), status=Status.RUNNING, done=0.3)
    artifact = make_result(make_run(job.owner, status=Status.SUCCEEDED, done=1.0))
    for address in (f"/runs/{job.pk}/", f"/runs/{job.pk}/parts/", f"/results/{artifact.pk}/", f"/runs/{uuid.uuid4()}/"):
        assert visitor.get(address).status_code == 404, address
    for address in (f"/runs/{job.pk}/cancel/", f"/results/{artifact.pk}/try/", f"/results/{artifact.pk}/check/"):
        assert visitor.post(address, {"sure": "yes", "text": "hello"}).status_code == 404, address
    assert "Sort customer messages" not in html(visitor, "/runs/")
    job.refresh_from_db()
    assert job.status == Status.RUNNING


def test_nobody_looks_without_logging_in(client: Client, ada: User) -> None:
    job = make_run(ada)
    for address in (f"/runs/{job.pk}/", f"/runs/{job.pk}/parts/", "/runs/", "/results/"):
        answer = client.get(address)
        assert answer.status_code == 302 and "/login/" in answer["Location"]


# -- sentences -----------------------------------------------------------------------------------------------------------------------


def test_those_in_front_are_named_when_they_are_ones_own_and_counted_when_not(visitor: Client, ada: User) -> None:
    eve = User.objects.create_user("eve")
    make_run(ada, status=Status.RUNNING, done=0.5, name="My first")
    make_run(eve, status=Status.RUNNING, done=0.5, name="Secret of Eve")
    job = make_run(ada, name="My second")
    text = html(visitor, f"/runs/{job.pk}/")
    assert "My first" in text and "1 run of other people" in text
    assert "Secret of Eve" not in text


def test_nothing_is_done_before_it_is_done(ada: User) -> None:
    job = make_run(ada, status=Status.RUNNING, done=0.5, total=1000)
    job.done_steps = 999
    assert telling.share(job) == 99
    job.done_steps = 1000
    assert telling.share(job) == 100
    assert telling.state(job).startswith("All steps are done")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3.0, "a few seconds left"),
        (9.0, "about 10 seconds left"),
        (43.0, "about 45 seconds left"),
        (130.0, "about 2 minutes left"),
        (5400.0, "about 1 h 30 min left"),
    ],
)  # fmt: skip
def test_time_left_is_said_as_coarsely_as_it_is_known(ada: User, seconds: float, words: str) -> None:
    assert telling.remaining(Job(owner=ada, eta_seconds=seconds)) == words


def test_health_counts_warnings_and_waits_for_evidence(ada: User) -> None:
    job = Job(owner=ada, done_steps=5, total_steps=100)
    assert telling.health([], job) == "too early to judge"
    job.done_steps = 50
    assert telling.health([{"action": "note"}], job) == "looks healthy"
    assert telling.health([{"action": "warn"}, {"action": "warn"}], job) == "2 warnings"
    assert telling.health([{"action": "warn"}, {"action": "stop"}], job) == "a watcher stopped it"


@pytest.mark.parametrize(
    ("code", "now", "changes"),
    [
        ("not_finite", {"learning_rate": 0.002}, {"learning_rate": 0.0002}),
        ("out_of_memory", {"batch_size": 16, "accumulate": 1}, {"batch_size": 8, "accumulate": 2}),
        ("out_of_memory", {"batch_size": 1}, {"gradient_checkpointing": "on"}),
        ("out_of_memory", {"batch_size": 1, "gradient_checkpointing": "on"}, None),
        ("bug", {"batch_size": 16}, None),
    ],
)  # fmt: skip
def test_a_failure_offers_the_change_that_mends_it(
    ada: User, code: str, now: dict[str, Any], changes: dict[str, Any] | None
) -> None:
    job = Job(owner=ada, status=Status.FAILED, faults=[{"code": code}], recipe={**RECIPE, "settings": now})
    found = telling.remedy(job)
    assert (dict(found.settings) if found else None) == changes


def test_the_early_phase_is_the_window_of_the_watcher(visitor: Client, ada: User) -> None:
    watched = make_run(ada, status=Status.RUNNING, done=0.3)
    own = {**RECIPE, "methods": [{"slug": "early-dynamics-stopping", "params": {"first_window": 0.05}}]}
    narrow = make_run(ada, status=Status.RUNNING, done=0.3, recipe=own)
    plain = make_run(ada, status=Status.RUNNING, done=0.3, recipe={**RECIPE, "methods": [{"slug": "paca"}]})
    for job, window in ((watched, "0.200000"), (narrow, "0.050000"), (plain, "0.100000")):
        assert f'data-window="{window}"' in html(visitor, f"/runs/{job.pk}/")


def test_a_run_is_told_when_the_engine_cannot_be_asked(
    visitor: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse() -> dict[str, Any]:
        asked.append(1)
        raise ConnectionError("no engine")

    monkeypatch.setattr(telling, "catalogue", refuse)
    monkeypatch.setattr(telling, "_asked_again_at", 0.0)
    job = make_run(ada, status=Status.RUNNING, done=0.3)
    assert "Learning to classify with paca" in html(visitor, f"/runs/{job.pk}/")
    assert len(asked) == 1  # and is not asked again for every sentence
    monkeypatch.setattr(telling, "_asked_again_at", 0.0)


# -- the list ------------------------------------------------------------------------------------------------------------------------


def test_the_list_finds_by_name_data_model_and_method(visitor: Client, ada: User) -> None:
    make_run(ada, name="Alpha", dataset=make_data(), model=make_model())
    make_run(ada, name="Beta", recipe={**RECIPE, "methods": [{"slug": "lora", "params": {}}]})
    for words, found, missing in (
        ("alp", "Alpha", "Beta"),
        ("lora", "Beta", "Alpha"),
        ("customer minilm", "Alpha", "Beta"),
    ):
        text = html(visitor, f"/runs/?q={words}", HTTP_HX_REQUEST="true")
        assert found in text and missing not in text, words
        assert "<html" not in text
    assert "Nothing fits" in html(visitor, "/runs/?q=nowhere")


def test_the_list_shows_one_kind_and_page_by_page(visitor: Client, ada: User) -> None:
    make_run(ada, name="At it", status=Status.RUNNING, done=0.4)
    for number in range(21):
        make_run(ada, name=f"Old {number:02}", status=Status.CANCELLED, done=0.2)
    first = html(visitor, "/runs/")
    assert first.index("At it") < first.index("Old 20")  # what moves stands first
    assert "Page 1 of 2" in first and "Old 00" not in first
    assert "Old 00" in html(visitor, "/runs/?page=2")
    only = html(visitor, "/runs/?show=active")
    assert "At it" in only and "Old" not in only


def test_the_empty_list_says_what_to_do(visitor: Client) -> None:
    text = html(visitor, "/runs/")
    assert "Start your first run" in text and "<table" not in text


def test_staff_sees_whose_run_it_is(client: Client, ada: User) -> None:
    make_run(ada)
    client.force_login(User.objects.create_superuser("root"))
    assert "by ada" in html(client, "/runs/")


@pytest.mark.slow
def test_again_with_the_remedy_starts_a_changed_run(
    visitor: Client, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine checks the changed recipe."""
    from jobs.starters import ensure_data, ensure_models

    monkeypatch.setattr(telling, "catalogue", catalogue.catalogue)
    ensure_data()
    ensure_models()
    recipe = {**RECIPE, "model": {"source": "starter:minilm-l6"}, "data": {"source": "starter:customer-messages"}}
    job = make_run(ada, status=Status.FAILED, done=0.2, faults=[FAULT], recipe=recipe)
    assert "Again with a learning rate of 0.0002" in html(visitor, f"/runs/{job.pk}/")
    visitor.post(f"/runs/{job.pk}/again/", {"with": "remedy"})
    repeat = Job.objects.get(again_of=job)
    assert repeat.recipe["settings"]["learning_rate"] == pytest.approx(0.0002)
    assert repeat.recipe["settings"]["batch_size"] == recipe["settings"]["batch_size"]
    assert repeat.status == Status.QUEUED
