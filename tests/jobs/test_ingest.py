"""From the log into the database: nothing lost, nothing twice, whatever is interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db.models import F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core.events import EventLog
from jobs import ingest
from jobs.ingest import Ingester
from jobs.lifecycle import Fenced
from jobs.models import Event, Job
from jobs.places import job_folder
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import metric_row


class Crash(Exception):
    pass


def reader(job: Job) -> Ingester:
    job.refresh_from_db()
    return Ingester(job, job_folder(job.pk), job.lease_epoch)


def steps(job: Job) -> list[int]:
    rows = Event.objects.filter(job=job, kind="metric").order_by("seq").values_list("data", flat=True)
    return [row["step"] for data in rows for row in data["rows"]]


def assert_dense(job: Job) -> None:
    job.refresh_from_db()
    assert list(Event.objects.filter(job=job).order_by("seq").values_list("seq", flat=True)) == list(
        range(1, job.last_seq + 1)
    )


def test_everything_arrives_and_the_header_knows_the_newest(
    make_job: MakeJob, write_log: Callable[..., EventLog]
) -> None:
    job = make_job()
    log = write_log(job, 25, per_event=5)
    log.emit("evaluation", {"eval_loss": 0.5, "best": True}, step=25)
    log.emit("progress", {"done_steps": 25, "total_steps": 50, "fraction": 0.5, "eta_seconds": 3.0}, step=25)
    log.emit("signal", {"action": "warn", "rule": "r", "message": "m", "numbers": {}}, step=25)
    taken = reader(job).drain()
    assert taken.num_events == 8
    assert steps(job) == list(range(1, 26))
    assert_dense(job)
    assert (job.done_steps, job.total_steps, job.eta_seconds, job.loss) == (25, 50, 3.0, 2.0 / 25)
    assert job.metrics["eval_loss"] == 0.5 and job.last_signal["action"] == "warn"
    assert job.log_seq == 8 and job.last_seq == 9
    assert reader(job).drain().num_events == 0


def test_a_number_that_is_not_finite_is_null_and_named(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    log = write_log(job)
    log.metric(metric_row(1, loss=float("nan")))
    log.flush()
    reader(job).drain()
    row = Event.objects.get(job=job, kind="metric").data["rows"][0]
    assert row["loss"] is None and row["nonfinite"] == ["loss"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_crash_anywhere_repeats_and_loses_nothing(
    make_job: MakeJob, write_log: Callable[..., EventLog], data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log grows by torn pieces; the reader dies before, within and after its transaction, and begins anew each time."""
    job = make_job()
    write_log(job, data.draw(st.integers(1, 40)), per_event=data.draw(st.integers(1, 7))).close()
    path = job_folder(job.pk) / "events.jsonl"
    whole = path.read_bytes()
    insert = ingest._insert
    shown = 0
    monkeypatch.setattr(ingest, "BATCH_BYTES", data.draw(st.integers(800, 8000)))
    while shown < len(whole):
        shown = min(len(whole), shown + data.draw(st.integers(200, 6000)))
        path.write_bytes(whole[:shown])
        when = data.draw(st.sampled_from(["never", "before", "after insert", "after commit"]))

        def broken(*arguments: Any, when: str = when) -> None:
            if when == "before":
                raise Crash
            insert(*arguments)
            if when == "after insert":
                raise Crash

        monkeypatch.setattr(ingest, "_insert", broken)
        with contextlib.suppress(Crash):
            reader(job).drain()
            if when == "after commit":
                raise Crash
        monkeypatch.setattr(ingest, "_insert", insert)
    reader(job).drain()
    assert_dense(job)
    lines = whole.count(b"\n")
    assert sorted(Event.objects.filter(job=job, log_seq__isnull=False).values_list("log_seq", flat=True)) == list(
        range(1, lines + 1)
    )
    assert job.log_offset == len(whole)


def test_the_answer_to_a_commit_that_got_lost_does_no_harm(
    make_job: MakeJob, write_log: Callable[..., EventLog]
) -> None:
    job = make_job()
    write_log(job, 5)
    first = reader(job)
    reader(job).drain()  # committed, but `first` never heard of it
    assert first.drain().num_events == 0
    assert steps(job) == [1, 2, 3, 4, 5]


def test_a_reader_without_the_lease_is_shut_out(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 5)
    zombie = reader(job)
    Job.objects.filter(pk=job.pk).update(lease_epoch=F("lease_epoch") + 1)
    with pytest.raises(Fenced):
        zombie.drain()
    assert not Event.objects.filter(job=job, kind="metric").exists()


def test_a_log_that_lost_its_end_with_the_power_goes_on(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 10).close()
    path = job_folder(job.pk) / "events.jsonl"
    whole = path.read_bytes()
    reader(job).drain()
    path.write_bytes(b"".join(line + b"\n" for line in whole.splitlines()[:6]))
    assert reader(job).drain().num_events == 0
    log = EventLog(job_folder(job.pk), interval=1e9)
    for step in range(7, 13):
        log.metric(metric_row(step))
        log.flush()
    reader(job).drain()
    assert_dense(job)
    from jobs.series import series

    assert series(job)["curves"]["loss"]["step"] == list(range(1, 13)), "each step is there once"


def test_a_damaged_line_is_left_out_and_the_rest_arrives(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 3).close()
    path = job_folder(job.pk) / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{\xff\xfe\n" + b'{"seq": 9}\n' + lines[2])
    reader(job).drain()
    assert steps(job) == [1, 3]
    assert_dense(job)


@pytest.mark.django_db(transaction=True)
def test_tens_of_thousands_of_events_a_second(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    """The goal is 200,000 a second on a quiet machine; the guard allows for a busy one."""
    job = make_job()
    write_log(job, 20_000)
    ingester = reader(job)
    began = time.process_time()
    assert ingester.drain().num_events == 20_000
    rate = 20_000 / (time.process_time() - began)
    print(f"{rate:,.0f} events a second of processor time")
    assert rate > 20_000
