"""The supervisor and real processes: start, follow, stop, lose, find again. The child is a script without an engine."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.db.models import F
from django.utils import timezone

from engine.core.errors import bad_input
from jobs import actions, launch, schedule, supervisor
from jobs.lifecycle import Fenced, transition
from jobs.models import TERMINAL, Artifact, Device, Event, Job, Status
from jobs.places import job_folder
from jobs.processes import is_alive, lock_holder, process_start, this_process
from jobs.reconcile import reconcile
from tests.jobs.conftest import MakeJob

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("one_device")]
SCRIPT = Path(__file__).with_name("fake_child.py")
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[launch.Child]]:
    """Children are the script; its manner is the name of the job. What is left of them is ended afterwards."""
    started: list[launch.Child] = []

    def spawn(folder: Path, gpu: str | None) -> launch.Child:
        manner = Job.objects.get(pk=folder.name).name
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder), manner], start_new_session=True)
        started.append(launch.Child(process.pid, process_start(process.pid) or 0, process))
        return started[-1]

    monkeypatch.setattr(launch, "_spawn", spawn)
    yield started
    for child in started:
        if child.process is not None and child.process.poll() is None:
            child.process.kill()
            child.process.wait()


@pytest.fixture
def at_work() -> Iterator[Callable[[Job], threading.Thread]]:
    """Run the worker in a thread of its own, as the consumer does."""
    threads: list[threading.Thread] = []

    def begin(job: Job) -> threading.Thread:
        def work() -> None:
            try:
                supervisor.work(job.pk)
            finally:
                connection.close()

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return threads[-1]

    yield begin
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "the worker did not come to an end"


def until(holds: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def fresh(job: Job) -> Job:
    return Job.objects.get(pk=job.pk)


def steps(job: Job) -> list[int]:
    rows = Event.objects.filter(job=job, kind="metric").order_by("seq").values_list("data", flat=True)
    return [row["step"] for data in rows for row in data["rows"]]


def story(job: Job) -> list[str]:
    return list(Event.objects.filter(job=job, kind="status").order_by("seq").values_list("data__to", flat=True))


def assert_told_once(job: Job) -> None:
    """No hole, no repeat, one end."""
    job = fresh(job)
    assert list(Event.objects.filter(job=job).order_by("seq").values_list("seq", flat=True)) == list(
        range(1, job.last_seq + 1)
    )
    assert steps(job) == sorted(set(steps(job)))
    assert len([status for status in story(job) if status in TERMINAL]) == (job.status in TERMINAL)


def test_a_run_from_its_claim_to_its_result(make_job: MakeJob, children: list[launch.Child]) -> None:
    job = make_job(name="works")
    supervisor.work(job.pk)
    job = fresh(job)
    assert (job.status, job.reason, job.message) == (Status.SUCCEEDED, "completed", "Learned.")
    assert story(job) == ["queued", "starting", "running", "succeeded"]
    assert steps(job) == list(range(1, 41)) and job.attempt == 1 and job.started_at and job.ended_at
    assert_told_once(job)
    artifact = Artifact.objects.get(job=job)
    assert len(artifact.content_id) == 64 and artifact.certificate == {"ok": True} and artifact.bytes > 0
    assert len(children) == 1


def test_what_the_engine_refuses_fails_with_its_sentence(make_job: MakeJob, children: list[launch.Child]) -> None:
    job = make_job(name="refused")
    supervisor.work(job.pk)
    job = fresh(job)
    assert (job.status, job.reason, job.message) == (Status.FAILED, "bad_input", "The label column is missing.")


def test_cancel_pause_resume_and_keep(
    make_job: MakeJob, children: list[launch.Child], at_work: Callable, person: User
) -> None:
    job = make_job(name="works slowly")
    worker = at_work(job)
    until(lambda: fresh(job).status == Status.RUNNING and len(steps(job)) > 2)
    actions.Pause(fresh(job)).execute(person)
    worker.join(20)
    paused = fresh(job)
    assert (
        paused.status == Status.PAUSED and paused.lease_owner == "" and paused.device == "" and paused.child_pid is None
    )
    seen = len(steps(job))
    actions.Resume(fresh(job)).execute(person)
    worker = at_work(job)
    until(lambda: len(steps(job)) > seen)
    actions.StopAndKeep(fresh(job)).execute(person)
    worker.join(20)
    assert (fresh(job).status, fresh(job).reason) == (Status.SUCCEEDED, "stopped")
    assert story(job) == [
        "queued",
        "starting",
        "running",
        "stopping",
        "paused",
        "queued",
        "starting",
        "running",
        "stopping",
        "succeeded",
    ]
    assert_told_once(job)

    other = make_job(name="works slowly")
    worker = at_work(other)
    until(lambda: fresh(other).status == Status.RUNNING)
    actions.Cancel(fresh(other)).execute(person)
    worker.join(20)
    assert fresh(other).status == Status.CANCELLED and not Artifact.objects.filter(job=other).exists()


def test_a_child_that_does_not_obey_is_ended(
    make_job: MakeJob, children: list[launch.Child], at_work: Callable, person: User, settings: object
) -> None:
    settings.BONSAI_GRACE_SECONDS = 0.3  # type: ignore[attr-defined]
    job = make_job(name="deaf")
    worker = at_work(job)
    until(lambda: fresh(job).status == Status.RUNNING)
    actions.Cancel(fresh(job)).execute(person)
    worker.join(20)
    assert fresh(job).status == Status.CANCELLED
    assert children[0].process is not None and children[0].process.returncode == -signal.SIGKILL


def test_a_killed_child_goes_on_from_where_it_was(make_job: MakeJob, children: list[launch.Child]) -> None:
    """It dies at steps 5, 15, 25 and 35; each attempt got further than a checkpoint at most once, so the third death in a row ends it."""
    job = make_job(name="crashes")
    while fresh(job).status == Status.QUEUED:
        supervisor.work(job.pk)
    job = fresh(job)
    # Steps 5 and 15 die before the checkpoint at 20 (crashes 1, 2), which forgives them; then 25 and 35 (1, 2), then the end.
    assert job.status == Status.SUCCEEDED and job.attempt == 5
    assert steps(job) == list(range(1, 41))
    assert_told_once(job)
    assert story(job).count("lost") == 4


def test_a_child_that_only_crashes_fails_with_a_sentence(make_job: MakeJob, children: list[launch.Child]) -> None:
    job = make_job(name="crashes at once")
    while fresh(job).status == Status.QUEUED:
        supervisor.work(job.pk)
    job = fresh(job)
    assert (job.status, job.reason, len(children)) == (Status.FAILED, "bug", 3)
    assert "SIGSEGV" in job.message and "3 times" in job.message and job.faults[0]["code"] == "lost"
    assert_told_once(job)


def test_a_disk_that_took_not_even_the_result_is_said(make_job: MakeJob, children: list[launch.Child]) -> None:
    """It is not started again and again: that would only fill the disk once more."""
    job = make_job(name="full disk")
    supervisor.work(job.pk)
    job = fresh(job)
    assert (job.status, job.reason, job.attempt) == (Status.FAILED, "environment", 1)
    assert "The disk took nothing more" in job.message and "Free space" in job.message and len(children) == 1
    assert_told_once(job)


def test_memory_that_ran_out_is_said(
    make_job: MakeJob, children: list[launch.Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([4, 5, 6, 7])
    monkeypatch.setattr("jobs.processes.num_memory_kills", lambda: next(counts))
    job = make_job(name="crashes")
    supervisor.work(job.pk)
    job = fresh(job)
    assert (job.status, job.reason) == (Status.FAILED, "out_of_memory") and "fewer examples" in job.message


def test_a_dead_workers_child_is_found_and_not_started_again(make_job: MakeJob, children: list[launch.Child]) -> None:
    """As after kill -9 of the consumer: the row says running, the child runs, its worker is gone."""
    job = make_job(name="works slowly")
    claimed = schedule.claim()
    assert claimed is not None
    child = launch.start(claimed, job_folder(job.pk))
    Job.objects.filter(pk=job.pk).update(child_pid=child.pid, child_started=child.started, lease_owner=gone())
    assert reconcile() == [job.pk]
    assert fresh(job).lease_owner == this_process() and fresh(job).lease_epoch == claimed.lease_epoch + 1
    supervisor.work(job.pk)
    assert fresh(job).status == Status.SUCCEEDED and len(children) == 1 and fresh(job).attempt == 1
    assert steps(job) == list(range(1, 41))
    assert_told_once(job)


def test_looking_twice_adopts_once(make_job: MakeJob) -> None:
    """The reconciler runs when the consumer starts and in the same moment as a task: the second look must not shut the first one's worker out."""
    job = make_job()
    claimed = schedule.claim()
    assert claimed is not None
    Job.objects.filter(pk=job.pk).update(lease_owner=gone())
    assert reconcile() == [job.pk] == reconcile(), "it is sent again until a thread stays with it"
    assert fresh(job).lease_epoch == claimed.lease_epoch + 1


def test_a_service_that_dies_while_it_launches_costs_nothing(
    make_job: MakeJob, children: list[launch.Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def alive(self) -> bool:
            return True

        def call(self, name: str, **request: object) -> dict[str, object]:
            raise bad_input(
                "call",
                "There is no call 'launch'.",
                "The service died, and a fresh process cannot launch.",
                "",
                "unknown_call",
            )

    monkeypatch.setattr(launch, "engine", lambda timeout: Dying())
    job = make_job(name="works")
    supervisor.work(job.pk)
    assert fresh(job).status == Status.SUCCEEDED and len(children) == 1


def test_a_child_that_nobody_wrote_down_is_found_by_its_lock(make_job: MakeJob, children: list[launch.Child]) -> None:
    """As after kill -9 of the consumer between the launch and the row."""
    job = make_job(name="works slowly")
    claimed = schedule.claim()
    assert claimed is not None
    launch.start(claimed, job_folder(job.pk))
    until(lambda: lock_holder(job_folder(job.pk) / "lock") is not None)
    Job.objects.filter(pk=job.pk).update(lease_owner=gone())
    reconcile()
    supervisor.work(job.pk)
    assert fresh(job).status == Status.SUCCEEDED and len(children) == 1
    assert len((job_folder(job.pk) / "launches").read_text().split()) == 1


def test_of_two_children_only_one_works_and_it_is_followed(make_job: MakeJob, children: list[launch.Child]) -> None:
    """The earlier worker's child takes the lock while ours is starting: ours leaves, and we follow the other."""
    job = make_job(name="works slowly")
    claimed = schedule.claim()
    assert claimed is not None
    folder = job_folder(job.pk)
    folder.mkdir(parents=True)
    first = launch._spawn(folder, None)
    supervisor.Supervision(claimed).run()
    assert fresh(job).status == Status.SUCCEEDED
    assert len((folder / "launches").read_text().split()) == 1
    assert first.process is not None and first.process.wait(10) in (0, 3)


def test_an_end_that_nobody_saw_is_judged_later(make_job: MakeJob, children: list[launch.Child]) -> None:
    job = make_job(name="works")
    claimed = schedule.claim()
    assert claimed is not None
    child = launch.start(claimed, job_folder(job.pk))
    Job.objects.filter(pk=job.pk).update(child_pid=child.pid, child_started=child.started, lease_owner=gone())
    assert child.process is not None
    child.process.wait(20)
    for job_id in reconcile():
        supervisor.work(job_id)
    assert fresh(job).status == Status.SUCCEEDED and len(children) == 1
    assert_told_once(job)


def test_a_worker_that_was_asleep_writes_nothing_more(make_job: MakeJob, children: list[launch.Child]) -> None:
    """As after SIGSTOP for longer than the lease: another worker took over, then the first one wakes."""
    job = make_job(name="works slowly")
    claimed = schedule.claim()
    assert claimed is not None
    zombie = supervisor.Supervision(claimed)
    assert zombie._begin()
    until(lambda: (zombie._tick(rung=False), len(steps(job)) > 3)[1])
    Job.objects.filter(pk=job.pk).update(lease_epoch=F("lease_epoch") + 1, lease_owner="somebody/1/1")
    before = fresh(job).last_seq
    time.sleep(0.3)
    with pytest.raises(Fenced):
        zombie._tick(rung=False)
    with pytest.raises(Fenced):
        zombie._end()
    assert fresh(job).last_seq == before and fresh(job).status == claimed.status


def test_a_clock_that_jumps_makes_nobody_lose_a_job(make_job: MakeJob, settings: object) -> None:
    """A lease that looks expired is left alone as long as somebody renews it."""
    settings.BONSAI_LEASE_SECONDS = 3.0  # type: ignore[attr-defined]
    job = make_job(name="elsewhere")
    transition(job, Status.STARTING, "w", lease_owner="otherhost/1/1", lease_until=timezone.now() - timedelta(hours=1))
    renewing = threading.Event()

    def renew() -> None:
        while not renewing.wait(0.2):
            Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(hours=1))
        connection.close()

    thread = threading.Thread(target=renew)
    thread.start()
    assert reconcile() == []
    renewing.set()
    thread.join()
    assert reconcile() == [job.pk], "and when nobody does, it is taken over"
    far = make_job(name="far")
    transition(
        far, Status.STARTING, "w", lease_owner="otherhost/1/1", lease_until=timezone.now() + timedelta(days=3650)
    )
    assert far.pk in reconcile(), "a lease from a clock that was years ahead does not hold for years"


def test_closing_the_studio_pauses_and_the_next_start_goes_on(
    make_job: MakeJob, children: list[launch.Child], at_work: Callable
) -> None:
    job = make_job(name="works slowly")
    worker = at_work(job)
    until(lambda: fresh(job).status == Status.RUNNING and len(steps(job)) > 2)
    supervisor.shutting_down.set()
    worker.join(20)
    assert fresh(job).status == Status.QUEUED and fresh(job).crashes == 0
    assert not any(is_alive(child.pid, child.started) for child in children)
    supervisor.shutting_down.clear()
    supervisor.work(job.pk)
    assert fresh(job).status == Status.SUCCEEDED
    assert steps(job) == list(range(1, 41))
    assert_told_once(job)


def test_one_device_carries_one_job_and_everyone_gets_a_turn(make_job: MakeJob, person: User) -> None:
    bob = User.objects.create_user("bob")
    mine = [make_job(name=f"mine {n}") for n in range(5)]
    his = make_job(name="his", owner=bob)
    urgent = make_job(name="urgent", priority=5)
    first = schedule.claim()
    assert first is not None and first.pk == urgent.pk
    assert schedule.claim() is None, "the only device is taken"
    transition(first, Status.FAILED, "test", "bug")
    second = schedule.claim()
    assert second is not None and second.pk == his.pk, "who was served longest ago comes first"
    transition(second, Status.FAILED, "test", "bug")
    third = schedule.claim()
    assert third is not None and third.pk == mine[0].pk
    Device.objects.update(enabled=False)
    transition(third, Status.FAILED, "test", "bug")
    assert schedule.claim() is None, "a device that was switched off carries nothing"


def test_a_forgotten_job_is_sent_again(make_job: MakeJob) -> None:
    job = make_job()
    assert reconcile() == [job.pk]


def gone() -> str:
    """The name of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    host = this_process().partition("/")[0]
    name = f"{host}/{process.pid}/{process_start(process.pid)}"
    process.kill()
    process.wait()
    return name
