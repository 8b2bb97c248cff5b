"""The life of a job: legal moves only, one winner, dense numbers, and no word from a worker that lost its lease."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connection
from django.db.models import F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.lifecycle import LEGAL, Fenced, IllegalTransition, Overtaken, transition
from jobs.models import ACTIVE, TERMINAL, Event, Job, Status
from tests.jobs.conftest import MakeJob

DRAWN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def seqs(job: Job) -> list[int]:
    return list(Event.objects.filter(job=job).order_by("seq").values_list("seq", flat=True))


@DRAWN
@given(moves=st.lists(st.tuples(st.sampled_from(Status), st.booleans(), st.integers(0, 2)), max_size=25))
def test_any_story_stays_legal_dense_and_final(make_job: MakeJob, moves: list[tuple[Status, bool, int]]) -> None:
    """Whatever is tried, in whatever order, by fresh and by stale readers, with right and with wrong epochs."""
    job = make_job()
    stale = Job.objects.get(pk=job.pk)
    story = [Status.QUEUED]
    for to, from_stale, epoch_error in moves:
        reader = stale if from_stale else job
        epoch = None if epoch_error == 0 else Job.objects.get(pk=job.pk).lease_epoch + (epoch_error == 2)
        before = Job.objects.get(pk=job.pk)
        changes: dict[str, Any] = {"lease_epoch": F("lease_epoch") + 1} if to is Status.STARTING else {}
        try:
            transition(
                reader,
                to,
                "test",
                "completed" if to is Status.SUCCEEDED else "bug" if to is Status.FAILED else "",
                epoch=epoch,
                **changes,
            )
        except Fenced:
            assert epoch_error == 2
            assert Job.objects.get(pk=job.pk).last_seq == before.last_seq
        except IllegalTransition as refusal:
            assert isinstance(refusal, Overtaken) or to not in LEGAL[Status(reader.status)]
            assert Job.objects.get(pk=job.pk).last_seq == before.last_seq
        else:
            assert to in LEGAL[Status(before.status)]
            assert epoch_error != 2
            story.append(to)
        job.refresh_from_db()
    assert job.status == story[-1]
    assert seqs(job) == list(range(1, job.last_seq + 1))
    told = Event.objects.filter(job=job, kind="status").order_by("seq").values_list("data__to", flat=True)
    assert list(told) == [status.value for status in story]
    assert not any(status in TERMINAL for status in story[:-1]), "nothing happens after the end"


def test_the_table_is_the_one_of_the_architecture() -> None:
    assert all(not LEGAL[status] for status in TERMINAL)
    assert LEGAL[Status.QUEUED] == {Status.STARTING, Status.CANCELLED}
    assert LEGAL[Status.RUNNING] == {Status.SUCCEEDED, Status.FAILED, Status.STOPPING, Status.LOST}
    assert LEGAL[Status.LOST] == {Status.QUEUED, Status.FAILED}
    assert LEGAL[Status.PAUSED] == {Status.QUEUED, Status.CANCELLED}


@pytest.mark.django_db(transaction=True)
def test_of_eight_who_want_a_job_one_gets_it(make_job: MakeJob) -> None:
    job = make_job()
    won: list[int] = []
    start = threading.Barrier(8)

    def try_it(number: int) -> None:
        mine = Job.objects.get(pk=job.pk)
        start.wait()
        try:
            transition(mine, Status.STARTING, f"worker {number}", lease_epoch=F("lease_epoch") + 1)
            won.append(number)
        except Overtaken:
            pass
        finally:
            connection.close()

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job.refresh_from_db()
    assert len(won) == 1 and job.status == Status.STARTING and job.lease_epoch == 1 and seqs(job) == [1, 2]


def test_a_worker_that_lost_its_lease_cannot_write(make_job: MakeJob) -> None:
    job = make_job()
    transition(job, Status.STARTING, "old", lease_epoch=F("lease_epoch") + 1)
    zombie = Job.objects.get(pk=job.pk)
    Job.objects.filter(pk=job.pk).update(lease_epoch=F("lease_epoch") + 1)  # another worker adopts it
    with pytest.raises(Fenced):
        transition(zombie, Status.RUNNING, "old", epoch=zombie.lease_epoch)
    assert Job.objects.get(pk=job.pk).status == Status.STARTING and seqs(job) == [1, 2]


@pytest.mark.parametrize("rest", sorted(set(Status) - ACTIVE - {Status.LOST, Status.QUEUED}))
def test_a_job_at_rest_belongs_to_nobody(make_job: MakeJob, rest: Status) -> None:
    job = make_job()
    transition(job, Status.STARTING, "w", lease_epoch=F("lease_epoch") + 1, lease_owner="w", child_pid=7, device="cpu")
    epoch = job.lease_epoch
    if rest in (Status.SUCCEEDED,):
        transition(job, Status.RUNNING, "w", epoch=epoch)
    if rest in (Status.CANCELLED, Status.PAUSED):
        transition(job, Status.STOPPING, "w", epoch=epoch, stop_request="pause")
    transition(job, rest, "w", {Status.SUCCEEDED: "completed", Status.FAILED: "bug"}.get(rest, ""), epoch=epoch)
    assert (job.lease_owner, job.lease_until, job.child_pid, job.device, job.stop_request) == ("", None, None, "", "")
    assert job.lease_epoch > epoch, "a worker that has not noticed is shut out"


def test_a_made_up_reason_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    transition(job, Status.STARTING, "w")
    with pytest.raises(ValueError, match="no reason"):
        transition(job, Status.FAILED, "w", "bad luck")
