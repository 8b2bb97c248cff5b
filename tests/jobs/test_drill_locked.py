"""Somebody locks the database for seconds while a run streams its events and a person clicks: nothing is lost, and nobody sees an error page."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connection
from django.test import Client

from jobs import launch
from jobs.models import ApiToken, Job, Status
from tests.drills import drill, often
from tests.jobs import api_kit as kit
from tests.jobs.conftest import MakeJob
from tests.jobs.test_supervisor import assert_told_once, at_work, children, fresh, steps, story, until

__all__ = ["at_work", "children"]  # fixtures
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        "sqlite" not in django_settings.DATABASES["default"]["ENGINE"], reason="the lock is one of SQLite's"
    ),
]


@contextlib.contextmanager
def locked() -> Any:
    """Nobody else may write. A reader still reads, which is what WAL is for."""
    rude = sqlite3.connect(str(Path(connection.settings_dict["NAME"])), timeout=20, isolation_level=None)
    rude.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        rude.execute("COMMIT")
        rude.close()


@pytest.mark.usefixtures("one_device")
def test_a_lock_of_seconds_is_only_a_wait(
    make_job: MakeJob, children: list[launch.Child], at_work: Callable[[Job], threading.Thread]
) -> None:
    seconds = often("BONSAI_DRILL_LOCK", 1)
    with drill(
        "database locked",
        f"an exclusive lock of {seconds} s while a run streams its events and a person clicks (reading, writing, pausing)",
        unit="answers",
        place="tests/jobs/test_drill_locked.py",
        setting="BONSAI_DRILL_LOCK",
    ) as told:
        job = make_job(name="works slowly")
        person = kit.Caller(job.owner, kit.tokens.issue(job.owner, "test")[1])
        browser = Client()
        browser.force_login(job.owner)
        answers: list[tuple[str, int, float]] = []
        over = threading.Event()

        def click(what: str, ask: Callable[[], Any]) -> None:
            try:
                while not over.is_set():
                    began = time.monotonic()
                    answers.append((what, ask().status_code, time.monotonic() - began))
                    over.wait(0.3)
            finally:
                connection.close()

        clicks: list[tuple[str, Callable[[], Any]]] = [
            ("a part of the page of a run", lambda: browser.get(f"/runs/{job.pk}/parts/")),
            ("its events", lambda: person.get(f"jobs/{job.pk}/events")),
            ("a new token", lambda: person.post("tokens", {"name": "laptop"})),
        ]
        for _, ask in clicks[:2]:  # everything is loaded, and the token is known to be in use
            assert ask().status_code == 200
        worker = at_work(job)
        until(lambda: fresh(job).status == Status.RUNNING and len(steps(job)) > 2)
        threads = [threading.Thread(target=click, args=clicking) for clicking in clicks]
        with locked():
            for thread in threads:
                thread.start()
            pausing = threading.Thread(
                target=click, args=("pause", lambda: over.set() or person.post(f"jobs/{job.pk}/pause"))
            )
            time.sleep(seconds * 0.8)
            before = len(answers)
            time.sleep(seconds * 0.2)
        time.sleep(0.5)
        pausing.start()
        for thread in [*threads, pausing, worker]:
            thread.join(30)
            assert not thread.is_alive()
        told.times = len(answers)
        bad = [answer for answer in answers if answer[1] >= 500 or (answer[1] >= 400 and answer[1] != 409)]
        told.violations = len(bad)
        assert not bad and before > 0, bad
        made = sum(1 for what, status, _ in answers if what == "a new token" and status == 201)
        assert ApiToken.objects.filter(name="laptop").count() == made >= 1, "what was answered with yes was done"
        longest = max(took for what, _, took in answers if what == "a new token")
        assert longest >= seconds * 0.9, "it waited for the lock, and was answered"
        kept = fresh(job)
        assert kept.status in (Status.PAUSED, Status.SUCCEEDED) and story(job)[:3] == ["queued", "starting", "running"]
        assert steps(job) == list(range(1, len(steps(job)) + 1)) and len(children) == 1
        assert_told_once(job)


@pytest.mark.parametrize("way", ["page", "rest"])
def test_a_database_that_does_not_answer_in_time_is_a_sentence(way: str) -> None:
    """Longer than anybody waits: 503 with a sentence and when to ask again, and nothing is half done."""
    owner = kit.caller("owner")
    assert owner.user is not None
    row = kit.job(owner.user, Status.RUNNING)
    browser = Client(raise_request_exception=False)
    browser.force_login(owner.user)
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA busy_timeout = 100")
    try:
        with locked():
            answer: Any = (
                browser.post(f"/runs/{row.pk}/pause/") if way == "page" else owner.post(f"jobs/{row.pk}/pause")
            )
    finally:
        connection.close()
    assert answer.status_code == 503 and answer["Retry-After"] == "5"
    text = answer.content.decode()
    assert "did not answer in time, so nothing was changed" in text and "Traceback" not in text
    assert fresh(row).status == Status.RUNNING and fresh(row).stop_request == ""
