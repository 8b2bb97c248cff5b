"""The wall clock jumps while leases run: no job is lost, and none runs twice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from jobs import launch, supervisor
from jobs.models import Event, Job, Status
from jobs.reconcile import reconcile
from tests.drills import drill, often
from tests.jobs.conftest import MakeJob
from tests.jobs.test_supervisor import assert_told_once, at_work, children, fresh, steps, story, until

__all__ = ["at_work", "children"]  # fixtures
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("one_device")]
JUMPS = {"+1 h": timedelta(hours=1), "-1 h": timedelta(hours=-1), "+10 years": timedelta(days=3652)}


class Clock:
    """The wall clock of this process, which jumps; the monotonic clock goes on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta()
        real_now, real_time = timezone.now, time.time
        patch.setattr(timezone, "now", lambda: self._shifted(real_now()))
        patch.setattr(time, "time", lambda: real_time() + self.ahead.total_seconds())

    def _shifted(self, moment: datetime) -> datetime:
        return moment + self.ahead


@pytest.fixture
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_loses_no_job_and_runs_none_twice(
    jump: str, make_job: MakeJob, children: list[launch.Child], at_work: Callable[[Job], threading.Thread], clock: Clock, settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run learns; another consumer, to which its worker is a stranger on another machine, looks for abandoned jobs all the time."""
    settings.BONSAI_LEASE_SECONDS = 1.2
    dice = random.Random(f"20264 {jump}")
    with drill(
        f"clock jumps {jump}",
        "the wall clock jumps at a random moment of a run, while another consumer looks for abandoned jobs all the time",
        unit="jumps",
        place="tests/jobs/test_drill_clock.py",
        setting="BONSAI_DRILL_CLOCK",
    ) as told:
        for _ in range(often("BONSAI_DRILL_CLOCK", 1)):
            clock.ahead = timedelta()
            job = make_job(name="works slowly")
            stolen: list[Any] = []
            over = threading.Event()

            def look(stolen: list[Any] = stolen, over: threading.Event = over) -> None:
                try:
                    while not over.is_set():
                        stolen += strangers_look()
                        over.wait(0.05)
                finally:
                    connection.close()

            worker = at_work(job)
            until(lambda job=job: fresh(job).status == Status.RUNNING and len(steps(job)) > 1)
            stranger = threading.Thread(target=look)
            stranger.start()
            time.sleep(dice.uniform(0.0, 0.6))
            clock.ahead = JUMPS[jump]
            worker.join(20)
            over.set()
            stranger.join()
            told.times += 1
            assert not worker.is_alive()
            assert stolen == [], "a lease that is renewed is nobody else's"
            assert (fresh(job).status, fresh(job).attempt) == (Status.SUCCEEDED, 1)
            assert story(job) == ["queued", "starting", "running", "succeeded"]
            assert steps(job) == list(range(1, 41))
            assert_told_once(job)
            assert Event.objects.filter(job=job, kind="status", data__to="starting").count() == 1
        assert len(children) == told.times, "no run was started twice"


def strangers_look() -> list[Any]:
    """What a consumer on another machine would take over now; it takes nothing."""
    from jobs import reconcile as module

    return [
        job.pk
        for job in module._still([job for job in Job.objects.filter(status__in=module.ACTIVE) if module._odd(job)])
    ]


@pytest.mark.parametrize("jump", JUMPS)
def test_a_lease_of_a_dead_machine_is_found_after_a_jump(
    jump: str, make_job: MakeJob, clock: Clock, settings: Any
) -> None:
    """However far the clock went, a job whose worker is gone waits for nobody for years."""
    settings.BONSAI_LEASE_SECONDS = 0.6
    job = make_job(name="elsewhere")
    from jobs.lifecycle import transition

    transition(
        job, Status.STARTING, "w", lease_owner="otherhost/1/1", lease_until=timezone.now() + timedelta(seconds=0.6)
    )
    clock.ahead = JUMPS[jump]
    began = time.monotonic()
    until(lambda: job.pk in reconcile(), 5)
    assert time.monotonic() - began < 4
    assert supervisor.RENEWALS_PER_LEASE >= 3
