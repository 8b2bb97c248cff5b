"""Under load: many writers at once, a database that is locked for a while, and histories that no person would think of."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.db import connection
from django.db.models import F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jobs import endings, schedule
from jobs.actions import ActionRefused, Cancel, Pause, Resume, StopAndKeep
from jobs.lifecycle import Fenced, IllegalTransition, transition
from jobs.models import ACTIVE, TERMINAL, Device, Event, Job, Status
from jobs.places import job_folder
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import artifact_in

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.django_db(transaction=True)
def test_eight_writers_and_a_locked_database(make_job: MakeJob) -> None:
    """Nobody gets an error: who writes waits for whoever writes, and a lock of seconds is only a wait."""
    jobs = [make_job(name=str(n)) for n in range(8)]
    waits: list[float] = []
    errors: list[Exception] = []
    until = time.monotonic() + 4.0

    def write(job: Job) -> None:
        try:
            while time.monotonic() < until:
                began = time.monotonic()
                fresh = Job.objects.get(pk=job.pk)
                to = (
                    Status.STARTING
                    if fresh.status == Status.QUEUED
                    else Status.LOST
                    if fresh.status == Status.STARTING
                    else Status.QUEUED
                )
                transition(fresh, to, "load")
                waits.append(time.monotonic() - began)
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=write, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    if connection.vendor == "sqlite":
        rude = sqlite3.connect(str(django_settings.DATABASES["default"]["NAME"]), timeout=20, isolation_level=None)
        rude.execute("BEGIN EXCLUSIVE")
        time.sleep(2.0)
        rude.execute("COMMIT")
        rude.close()
    for thread in threads:
        thread.join()
    assert not errors
    for job in jobs:
        job.refresh_from_db()
        assert Event.objects.filter(job=job).count() == job.last_seq
    usual = sorted(waits)[int(len(waits) * 0.95)]
    print(f"{len(waits)} changes, 95 % within {usual * 1000:.0f} ms")


class Histories(RuleBasedStateMachine):
    """People and workers do anything in any order: submit, cancel, pause, resume, stop, claim, die, steal, wake up too late, end."""

    people: Any = None

    @initialize()
    def begin(self) -> None:
        Job.objects.all().delete()
        self.people = [User.objects.get_or_create(username=name)[0] for name in ("ada", "bob")]
        self.workers: list[tuple[Job, int]] = []
        self.ended: dict[Any, str] = {}

    def pick(self, number: int) -> Job | None:
        jobs = list(Job.objects.order_by("created"))
        return jobs[number % len(jobs)] if jobs else None

    @rule(who=st.integers(0, 1))
    def submit(self, who: int) -> None:
        from jobs.lifecycle import begin

        begin(Job(owner=self.people[who], name="x", request={}, recipe={}, fingerprint="f" * 64), "test")

    @rule(number=st.integers(0, 9), action=st.sampled_from([Cancel, Pause, Resume, StopAndKeep]))
    def ask(self, number: int, action: Any) -> None:
        job = self.pick(number)
        if job is not None:
            with contextlib.suppress(ActionRefused):
                action(job).execute(User.objects.get(pk=job.owner_id))

    @rule()
    def claim(self) -> None:
        job = schedule.claim()
        if job is not None:
            self.workers.append((job, job.lease_epoch))

    @rule(number=st.integers(0, 9))
    def learn(self, number: int) -> None:
        self.as_worker(number, lambda job, epoch: transition(job, Status.RUNNING, "w", epoch=epoch))

    @rule(number=st.integers(0, 9))
    def steal(self, number: int) -> None:
        job = self.pick(number)
        if job is not None and job.status in ACTIVE and schedule.adopt(job):
            self.workers.append((job, job.lease_epoch + 1))

    @rule(
        number=st.integers(0, 9),
        how=st.sampled_from(["succeeded", "failed", "paused", "cancelled", "silent", "out of memory"]),
    )
    def end(self, number: int, how: str) -> None:
        def conclude(job: Job, epoch: int) -> None:
            folder = job_folder(job.pk)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").unlink(missing_ok=True)
            if how not in ("silent", "out of memory"):
                reason = {"succeeded": "completed", "failed": "bug"}.get(how, how)
                (folder / "result.json").write_text(
                    f'{{"outcome": "{how}", "reason": "{reason}", "message": "So it ended."}}'
                )
            if how == "succeeded" and not (folder / "artifact").exists():
                artifact_in(folder)
            endings.conclude(job, epoch, folder, None, killed=False, memory_ran_out=how == "out of memory")

        self.as_worker(number, conclude)

    def as_worker(self, number: int, act: Any) -> None:
        """One of all workers there ever were, most of them without a lease by now, acts with what it believes."""
        if not self.workers:
            return
        job, epoch = self.workers[number % len(self.workers)]
        before = Job.objects.filter(pk=job.pk).first()
        fresh = Job.objects.filter(pk=job.pk).first()
        if before is None or fresh is None:
            return
        try:
            act(fresh, epoch)
        except Fenced:
            assert before.lease_epoch != epoch, "only a worker without the lease is shut out"
        except IllegalTransition:
            assert Job.objects.get(pk=job.pk).last_seq == before.last_seq
        else:
            assert before.lease_epoch == epoch, "a worker without the lease wrote"

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        active = list(Job.objects.filter(status__in=ACTIVE))
        assert len(active) <= Device.objects.count(), "one device, one job"
        for job in Job.objects.all():
            assert job.status != Status.LOST, "lost is a moment, not a place to stay"
            told = list(Event.objects.filter(job=job).order_by("seq").values_list("seq", "data__to"))
            assert [seq for seq, _ in told] == list(range(1, job.last_seq + 1))
            assert told[-1][1] == job.status
            assert sum(to in TERMINAL for _, to in told) == (job.status in TERMINAL)
            if self.ended.get(job.pk, job.status) != job.status:
                raise AssertionError("an end was changed")
            if job.status in TERMINAL:
                self.ended[job.pk] = job.status
            assert (job.status in ACTIVE) == bool(job.device), "only who works holds a device"


def test_no_history_loses_or_doubles_a_job(db: None) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Histories,
        settings=settings(max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=checks),
    )


@pytest.mark.django_db(transaction=True)
def test_a_thousand_jobs_of_fifty_people_all_get_their_turn(make_job: MakeJob) -> None:
    """The person who came first with a thousand jobs does not make the others wait for all of them."""
    crowd = [User(username=f"p{n}") for n in range(50)]
    User.objects.bulk_create(crowd)
    crowd = list(User.objects.filter(username__startswith="p"))
    rows = [
        Job(owner=crowd[0], name="many", request={}, recipe={}, fingerprint="f" * 64, queued_at="2026-01-01T00:00:00Z")
        for _ in range(951)
    ]
    rows += [
        Job(owner=one, name="one", request={}, recipe={}, fingerprint="f" * 64, queued_at="2026-01-02T00:00:00Z")
        for one in crowd[1:]
    ]
    Job.objects.bulk_create(rows)
    owners = []
    for _ in range(60):
        job = schedule.claim()
        assert job is not None
        owners.append(job.owner_id)
        Job.objects.filter(pk=job.pk).update(status=Status.SUCCEEDED, device="", lease_epoch=F("lease_epoch") + 1)
    assert len(set(owners)) == 50, "within sixty turns everybody had one"
