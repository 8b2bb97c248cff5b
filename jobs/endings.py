"""How a run ended, as a state and a sentence: from what the child left, or from how it died."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

from django.db import transaction as database
from django.db.models import F

from engine.core.artifact import MANIFEST
from engine.core.control import DISK_REFUSED
from engine.core.errors import EngineError, Fault
from jobs.launch import RESULT, Child, read_json
from jobs.lifecycle import REASONS, Overtaken, transition
from jobs.models import Artifact, Job, Status

logger = logging.getLogger(__name__)
BY = "supervisor"
SHUTDOWN = "shutdown"
MAX_CRASHES = 2  # in a row, without a new checkpoint in between
ARTIFACT = "artifact"


def conclude(job: Job, epoch: int, folder: Path, child: Child | None, *, killed: bool, memory_ran_out: bool) -> None:
    """Bring a job whose child has ended to rest. Repeated when a person changed the job in the same moment."""
    result = read_json(folder / RESULT)
    status = child.exit_status(folder) if child is not None and not result else None
    while True:
        try:
            with database.atomic():
                if result:
                    _told(job, epoch, folder, result)
                else:
                    _silent(job, epoch, status, killed=killed, memory_ran_out=memory_ran_out)
            return
        except Overtaken:
            job.refresh_from_db()


def not_started(job: Job, epoch: int, error: Exception) -> None:
    """The child could not even be started."""
    if isinstance(error, EngineError):
        fault = error.fault
    else:
        fault = Fault(
            where="machine",
            what="The run could not be started.",
            why=f"The machine refused: {error}.",
            way_out="Free space or mend the permission, then press “Again”.",
            code="not_started",
        )
    while True:
        try:
            with database.atomic():
                transition(
                    job, Status.FAILED, BY, "environment", epoch=epoch, message=str(fault), faults=[fault.to_dict()]
                )
            return
        except Overtaken:  # a person asked it to stop: it has stopped
            job.refresh_from_db()


def _told(job: Job, epoch: int, folder: Path, result: dict[str, Any]) -> None:
    """The child said how it ended."""
    message, reason = str(result.get("message", "")), str(result.get("reason", ""))
    outcome = result.get("outcome")
    if outcome == "succeeded" and _record_artifact(job, folder):
        _reach(
            job,
            Status.SUCCEEDED,
            epoch,
            reason if reason in REASONS[Status.SUCCEEDED] else "completed",
            message=message,
        )
    elif outcome == "paused":
        _paused(job, epoch, message)
    elif outcome == "cancelled":
        _reach(job, Status.CANCELLED, epoch, "", message=message)
    else:
        if outcome != "failed":
            reason, message = (
                "bug",
                "The run ended, but its result could not be read. Press “Again”; if it happens twice, report it.",
            )
        _reach(
            job,
            Status.FAILED,
            epoch,
            reason if reason in REASONS[Status.FAILED] else "bug",
            message=message,
            faults=result.get("faults", []),
        )


def _paused(job: Job, epoch: int, message: str) -> None:
    wish, closing = job.stop_request, job.reason == SHUTDOWN
    if wish == "cancel":
        _reach(
            job, Status.CANCELLED, epoch, "", message="Cancelled; the checkpoints are kept until the job is deleted."
        )
        return
    _reach(job, Status.PAUSED, epoch, "", message=message)
    if wish == "pause" and not closing:
        return
    # Nobody asked for the pause (the machine or the studio closes), or it has to come back to export what it learned.
    tries = F("crashes") + 1 if wish == "stop" else F("crashes")
    if wish == "stop" and job.crashes >= MAX_CRASHES:
        return
    transition(
        job,
        Status.QUEUED,
        BY,
        "interrupted",
        message="It was interrupted and goes on from where it was.",
        stop_request="stop" if wish == "stop" else "",
        crashes=tries,
    )


def _silent(job: Job, epoch: int, status: tuple[int, int] | None, *, killed: bool, memory_ran_out: bool) -> None:
    """The child ended without a word."""
    if job.stop_request == "cancel":
        _reach(
            job,
            Status.CANCELLED,
            epoch,
            "",
            message="Cancelled; the run had to be ended from outside." if killed else "Cancelled.",
        )
        return
    if job.stop_request == "pause" and killed and job.reason != SHUTDOWN:
        _reach(
            job,
            Status.PAUSED,
            epoch,
            "",
            message="Paused; the run had to be ended from outside and goes on from its last checkpoint.",
        )
        return
    code, number = status if status is not None else (0, 0)
    how = (
        f"It was ended by {signal.Signals(number).name}."
        if number
        else f"Its process ended with code {code}."
        if code
        else "Its process was gone, and nobody saw why."
    )
    wish = "stop" if job.stop_request == "stop" else ""
    transition(job, Status.LOST, BY, "crashed", epoch=epoch, message=how)
    if memory_ran_out and number in (0, signal.SIGKILL):
        fault = Fault(
            where="settings.batch_size",
            what="The machine ran out of memory and ended the run.",
            code="out_of_memory",
            why="The system ends the largest process when nothing is left.",
            way_out="Choose fewer examples at a time (and add up more batches), a shorter longest text, or a smaller model.",
        )
        transition(job, Status.FAILED, BY, "out_of_memory", epoch=epoch, message=str(fault), faults=[fault.to_dict()])
    elif code == DISK_REFUSED:
        fault = Fault(
            where="machine",
            what="The disk took nothing more, not even the result of this run.",
            why="A full disk is the usual cause.",
            way_out="Free space, then go on from the last saved state: it is kept.",
            code="disk_refused",
        )
        transition(job, Status.FAILED, BY, "environment", epoch=epoch, message=str(fault), faults=[fault.to_dict()])
    elif job.crashes < MAX_CRASHES:
        transition(
            job,
            Status.QUEUED,
            BY,
            "crashed",
            epoch=epoch,
            crashes=F("crashes") + 1,
            stop_request=wish,
            message=f"The run was interrupted. {how} It goes on from its last checkpoint.",
        )
    else:
        outside = number in (0, signal.SIGKILL, signal.SIGTERM) and not code
        fault = Fault(
            where="machine",
            what=f"The run was interrupted {MAX_CRASHES + 1} times without getting further.",
            why=how,
            way_out="Look at the end of the run's log, then press “Again”.",
            code="lost",
        )
        transition(
            job,
            Status.FAILED,
            BY,
            "environment" if outside else "bug",
            epoch=epoch,
            message=str(fault),
            faults=[fault.to_dict()],
        )


def _reach(job: Job, to: Status, epoch: int, reason: str, **changes: Any) -> None:
    """Go to `to`, through the states that lie between when the child was quicker than we looked."""
    if to in (Status.CANCELLED, Status.PAUSED) and job.status in (Status.STARTING, Status.RUNNING):
        transition(job, Status.STOPPING, BY, epoch=epoch, stop_request=job.stop_request)
    if to is Status.SUCCEEDED and job.status == Status.STARTING:
        transition(job, Status.RUNNING, BY, epoch=epoch)
    transition(job, to, BY, reason, epoch=epoch, **changes)


def _record_artifact(job: Job, folder: Path) -> bool:
    place = folder / ARTIFACT
    manifest, description = read_json(place / MANIFEST), read_json(place / "artifact.json")
    if not manifest.get("id") or not description:
        logger.error("Job %s says it succeeded, but its result cannot be read.", job.pk)
        return False
    files = dict(manifest["files"])
    Artifact.objects.update_or_create(
        job=job,
        defaults={
            "folder": str(place),
            "content_id": manifest["id"],
            "description": description,
            "files": files,
            "certificate": read_json(place / "certificate.json"),
            "bytes": sum(int(item["bytes"]) for item in files.values()),
        },
    )
    return True
