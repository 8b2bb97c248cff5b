"""The life of a job. `transition` is the only writer of a status.

A change is a compare-and-swap on the old status, for workers also on the epoch of their lease. The numbered event that tells of it is
written in the same transaction, so the history can never disagree with the state.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from jobs import wake
from jobs.models import ACTIVE, TERMINAL, Event, Job, Status

LEGAL: Mapping[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.STARTING, Status.CANCELLED}),
    Status.STARTING: frozenset({Status.RUNNING, Status.STOPPING, Status.FAILED, Status.LOST}),
    Status.RUNNING: frozenset({Status.SUCCEEDED, Status.FAILED, Status.STOPPING, Status.LOST}),
    Status.STOPPING: frozenset({Status.CANCELLED, Status.PAUSED, Status.SUCCEEDED, Status.FAILED, Status.LOST}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.LOST: frozenset({Status.QUEUED, Status.FAILED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
REASONS: Mapping[Status, frozenset[str]] = {
    Status.SUCCEEDED: frozenset({"completed", "early_stopped", "budget", "stopped"}),
    Status.FAILED: frozenset({"bad_input", "out_of_memory", "diverged", "environment", "bug"}),
}


class IllegalTransition(Exception):
    """A job cannot go from its state to the wanted one."""


class Overtaken(IllegalTransition):
    """Somebody else changed the job first; look at it again."""


class Fenced(Exception):
    """The worker that wrote no longer holds the job's lease; it must stop writing."""


def begin(job: Job, by: str) -> None:
    """Save a new job: queued, with its first event."""
    job.status = Status.QUEUED
    job.queued_at = timezone.now()
    job.last_seq = 1
    job.message = job.message or "Waits for its turn."
    with transaction.atomic():
        job.save(force_insert=True)
        data = {"from": "", "to": Status.QUEUED.value, "by": by, "reason": "", "message": job.message, "attempt": 0}
        Event.objects.create(job=job, seq=1, kind="status", time=time.time(), data=data)
        wake.ring_on_commit(str(job.pk))


def transition(
    job: Job, to: Status, by: str, reason: str = "", *, message: str = "", epoch: int | None = None, **changes: Any
) -> Job:
    """Move `job` from the state it was read in to `to`, together with `changes`, or raise and change nothing."""
    old = Status(job.status)
    if to not in LEGAL[old]:
        raise IllegalTransition(f"A job that is {old.label.lower()} cannot become {to.label.lower()}.")
    if reason not in REASONS.get(to, {reason}):
        raise ValueError(f"'{reason}' is no reason for a job to have {to.value}.")
    values: dict[str, Any] = {**_consequences(job, to), "reason": reason, "message": message, **changes}
    rows = Job.objects.filter(pk=job.pk, status=old)
    if epoch is not None:
        rows = rows.filter(lease_epoch=epoch)
    with transaction.atomic():
        if not rows.update(status=to, last_seq=F("last_seq") + 1, **values):
            raise _why_not(job.pk, old, epoch)
        job.refresh_from_db()
        data = {
            "from": old.value,
            "to": to.value,
            "by": by,
            "reason": reason,
            "message": message,
            "attempt": job.attempt,
        }
        Event.objects.create(job=job, seq=job.last_seq, kind="status", step=job.done_steps, time=time.time(), data=data)
        wake.ring_on_commit(str(job.pk))
    return job


def _consequences(job: Job, to: Status) -> dict[str, Any]:
    """What follows from a state for the other fields."""
    now = timezone.now()
    values: dict[str, Any] = {}
    if to is Status.QUEUED:
        values["queued_at"] = now
    if to is Status.STARTING and job.started_at is None:
        values["started_at"] = now
    if to in TERMINAL:
        values["ended_at"] = now
    if to not in ACTIVE and to is not Status.LOST:
        # Nobody works on it any more. Raising the epoch shuts out a worker that has not noticed.
        values |= {
            "lease_owner": "",
            "lease_until": None,
            "lease_epoch": F("lease_epoch") + 1,
            "child_pid": None,
            "child_started": None,
            "device": "",
            "stop_request": "",
            "eta_seconds": None,
        }
    return values


def _why_not(job_id: uuid.UUID, old: Status, epoch: int | None) -> Exception:
    now = Job.objects.filter(pk=job_id).values_list("status", "lease_epoch").first()
    if now is None:
        return Overtaken("The job was deleted in the meantime.")
    if epoch is not None and now[1] != epoch:
        return Fenced(f"Another worker holds this job now (epoch {now[1]}, ours was {epoch}).")
    return Overtaken(f"The job is {Status(now[0]).label.lower()} by now; it was {old.label.lower()}.")
