"""Stays with one job from its launch to its rest: starts the child, reads its log, renews the lease, forwards requests, judges its end.

The child is a process of its own. When this worker dies the child goes on, and the next worker finds it again by its number and start
time. Every write here carries the epoch of the lease, so a worker that lost it cannot write.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from typing import Any, Literal

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection

from engine.core.control import write_request
from engine.core.errors import EngineError
from jobs import endings, launch, processes, schedule, wake
from jobs.curves import Curves
from jobs.ingest import Ingester
from jobs.lifecycle import Fenced, Overtaken, transition
from jobs.models import ACTIVE, Job, Status
from jobs.places import job_folder

logger = logging.getLogger(__name__)
FIRST_LOOK_SECONDS, LOOK_SECONDS, SLOWER = 0.01, 0.1, 1.25  # looks at the log are frequent after news and become rarer
ASK_SECONDS = 1.0
COLUMN_SECONDS, LAST_COLUMN_SECONDS = (
    0.3,
    10.0,
)  # spent on the columns at a look, and at the end; who looks at a chart reads the rest
RENEWALS_PER_LEASE = 6

shutting_down = threading.Event()
ears: wake.Ears | None = None
_mine: set[uuid.UUID] = set()
_lock = threading.Lock()


def supervised_here() -> frozenset[uuid.UUID]:
    """Jobs that a thread of this process stays with."""
    with _lock:
        return frozenset(_mine)


def work(hint: uuid.UUID) -> None:
    """Take up the job `hint` if this process adopted it, or else claim the one whose turn it is; return when it rests."""
    if shutting_down.is_set():
        return
    ours = Job.objects.filter(status__in=ACTIVE, lease_owner=processes.this_process())
    job = ours.filter(pk=hint).first() or schedule.claim()
    if job is None:
        return
    with _lock:
        if job.pk in _mine:
            return
        _mine.add(job.pk)
    try:
        mine = ours.filter(pk=job.pk).first()  # as it is now that no other thread of ours can take it
        if mine is not None:
            Supervision(mine).run()
    except Fenced as error:
        logger.warning("Job %s: %s This worker leaves it.", job.pk, error)
    finally:
        with _lock:
            _mine.discard(job.pk)


class Supervision:
    """One worker's time with one job."""

    def __init__(self, job: Job) -> None:
        self.job, self.epoch = job, job.lease_epoch
        self.folder = job_folder(job.pk)
        self.ingester = Ingester(job, self.folder, self.epoch)
        self.curves = Curves(self.folder)
        self.child: launch.Child | None = None
        self.memory_kills = processes.num_memory_kills()
        self.killed = False
        self._renewed = self._asked = time.monotonic()
        self._forwarded = ""
        self._deadline: float | None = None
        self._next_signal: Literal["TERM", "KILL"] = "TERM"
        self._pause = FIRST_LOOK_SECONDS

    def run(self) -> None:
        topic = str(self.job.pk)
        flag = ears.listen(topic) if ears else threading.Event()
        try:
            if not self._begin():
                return
            while True:
                flag.clear()
                alive = self._patiently(self._tick, rung=flag.is_set())
                if not alive:
                    break
                flag.wait(self._pause)
            self._patiently(self._end)
        finally:
            if ears:
                ears.ignore(topic, flag)

    def _patiently(self, step: Any, **arguments: Any) -> Any:
        """Do one step; while the database cannot be reached the child goes on, and so do we as soon as it is back."""
        while True:
            try:
                return step(**arguments)
            except (OperationalError, InterfaceError) as error:
                logger.warning("Job %s: the database does not answer (%s); trying again.", self.job.pk, error)
                connection.close()
                time.sleep(1.0)

    def _begin(self) -> bool:
        self.child = launch.find(self.job, self.folder)
        if self.child is None and self.job.status == Status.STARTING and not launch.has_begun(self.job, self.folder):
            try:
                self.child = launch.start(self.job, self.folder)
            except (EngineError, OSError) as error:
                endings.not_started(self.job, self.epoch, error)
                return False
        if self.child is not None:
            self._write(child_pid=self.child.pid, child_started=self.child.started)
        return True

    def _tick(self, rung: bool) -> bool:
        """One look at everything; False when the child has ended."""
        alive = self.child is not None and self.child.is_alive()
        taken = self.ingester.drain()
        self._pause = FIRST_LOOK_SECONDS if taken.num_events else min(self._pause * SLOWER, LOOK_SECONDS)
        now = time.monotonic()
        if self.job.status == Status.STARTING and "running" in taken.states:
            self._move(Status.RUNNING, message=taken.message)
        if self._deadline is not None and taken.states:
            # It heard the request and is exporting or saving; that may take longer than a step.
            self._deadline = now + 10 * settings.BONSAI_GRACE_SECONDS
        if now - self._renewed >= settings.BONSAI_LEASE_SECONDS / RENEWALS_PER_LEASE:
            self._write(lease_until=schedule.lease_end())
            self._renewed = now
        if rung or shutting_down.is_set() or now - self._asked >= ASK_SECONDS:
            self._asked = now
            self._keep_columns(COLUMN_SECONDS)
            self._obey()
        self._insist(now)
        if not alive and self.child is not None:
            # The folder's lock says who works there: perhaps a child that an earlier worker launched and could not record.
            other = launch.find(self.job, self.folder, beside=self.child.pid)
            if other is not None:
                self.child = other
                self._write(child_pid=other.pid, child_started=other.started)
                return True
        return alive

    def _keep_columns(self, seconds: float) -> None:
        """Let the columns follow the log, so that who opens a long run does not wait for them. They can be made anew at any time."""
        try:
            self.curves.read_on(self.ingester.offset, seconds=seconds)
        except OSError:
            logger.warning("Job %s: the columns beside the log could not be written.", self.job.pk, exc_info=True)

    def _obey(self) -> None:
        """Forward what somebody asked for since the last look."""
        self.job.refresh_from_db()
        if self.job.lease_epoch != self.epoch:
            raise Fenced(f"Another worker holds this job now (epoch {self.job.lease_epoch}, ours was {self.epoch}).")
        running = self.job.status in (Status.STARTING, Status.RUNNING)
        if running and self.job.stop_request:  # asked of an earlier attempt, which died before it could obey
            self._move(Status.STOPPING, self.job.stop_request, message=self.job.message)
        elif running and shutting_down.is_set():
            self._move(
                Status.STOPPING,
                endings.SHUTDOWN,
                message="The studio is closing; this run will go on at the next start.",
                stop_request="pause",
            )
        request = self.job.stop_request
        if request and request != self._forwarded and self.job.status == Status.STOPPING:
            write_request(self.folder, request)  # type: ignore[arg-type]  # only our own actions write this field
            self._forwarded = request
            self._deadline = time.monotonic() + settings.BONSAI_GRACE_SECONDS
            self._next_signal = "TERM"

    def _insist(self, now: float) -> None:
        """A child that does not obey in time is told by the kernel."""
        if self._deadline is None or now < self._deadline or self.child is None:
            return
        if self._next_signal == "TERM":
            processes.signal_group(self.child.pid, signal.SIGTERM)
            self._next_signal = "KILL"
            self._deadline = now + settings.BONSAI_GRACE_SECONDS
        else:
            self.killed = True
            processes.signal_group(self.child.pid, signal.SIGKILL)
            self._deadline = now + settings.BONSAI_GRACE_SECONDS

    def _end(self) -> None:
        """The child is gone: take the rest of its log, judge how it ended, and write that down."""
        self.ingester.drain()
        self._keep_columns(LAST_COLUMN_SECONDS)
        self.job.refresh_from_db()
        if self.job.lease_epoch != self.epoch:
            raise Fenced("Another worker judged the end of this run.")
        out_of_memory = processes.num_memory_kills() > self.memory_kills
        endings.conclude(
            self.job, self.epoch, self.folder, self.child, killed=self.killed, memory_ran_out=out_of_memory
        )

    def _move(self, to: Status, reason: str = "", **changes: Any) -> None:
        try:
            transition(self.job, to, "supervisor", reason, epoch=self.epoch, **changes)
        except Overtaken:
            self.job.refresh_from_db()  # a person was quicker; the next look sees what they want

    def _write(self, **changes: Any) -> None:
        if not Job.objects.filter(pk=self.job.pk, lease_epoch=self.epoch).update(**changes):
            raise Fenced("The lease of this job was taken over.")
