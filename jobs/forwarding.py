"""Sends the curves of runs on to MLflow, Weights & Biases or Trackio, when BONSAI_FORWARD says so and never otherwise.

A follower of the log, in a process of its own (`manage.py forward --follow`, started by `up`), with a thread for each tracker. Trainings know nothing
of it. How far a tracker was told stands in the job's folder, in forward/<tracker>.json, and moves only when the tracker has taken what was sent;
so a tracker that is away loses nothing. The point of a log is its number: it is found again after whatever happened to file or tracker.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection
from django.db.models import Q
from django.utils import timezone

from engine.core.control import write_json
from engine.core.events import LOG_NAME
from jobs.models import ACTIVE, TERMINAL, Job
from jobs.places import home, job_folder
from jobs.points import Point, parsed, points
from jobs.trackers import TRACKERS, About, Away, End, Refused, Run, Tracker, missing

logger = logging.getLogger(__name__)
LOOK_SECONDS, MOST_SECONDS = 2.0, 60.0  # between looks; between tries while a tracker is away
MOST_NUMBERS = 1000  # sent at once
SHARE_SECONDS = 5.0  # for one job at a look, so that a long backlog keeps no other run waiting
RECENT = timedelta(days=1)  # after the first look, older jobs can have nothing new
SINCE = "forward.json"


@dataclass(frozen=True)
class Target:
    """One entry of BONSAI_FORWARD that can be used."""

    slug: str
    tracker: Tracker

    def __str__(self) -> str:
        return str(self.tracker)


def targets() -> tuple[list[Target], list[tuple[str, str]]]:
    """What BONSAI_FORWARD names, and of what cannot be used: what is wrong and what to do, in sentences."""
    good: list[Target] = []
    faults: list[tuple[str, str]] = []
    forms = ", ".join(tracker.form for tracker in TRACKERS.values())
    for entry in _entries():
        kind, _, where = entry.partition(":")
        maker = TRACKERS.get(kind)
        if maker is None:
            faults.append(
                (
                    f"BONSAI_FORWARD names a tracker of the kind “{kind}”, which is unknown; nothing is sent there.",
                    f"Write one of: {forms}.",
                )
            )
            continue
        try:
            target = Target(_slug(entry), maker(where))
        except ValueError as error:
            faults.append(
                (
                    f"BONSAI_FORWARD names {maker.title}, and nothing is sent there. {_sentence(error)}",
                    f"Write {maker.form}.",
                )
            )
            continue
        if maker.package and missing(maker.package):
            faults.append(
                (
                    f"Nothing is sent to {maker.title}: the package {maker.package} is not installed.",
                    f"Install it with “{sys.executable} -m pip install {maker.package}”, or take {kind}: out of BONSAI_FORWARD.",
                )
            )
            continue
        good.append(target)
    return good, faults


def _entries() -> list[str]:
    return [entry for entry in dict.fromkeys(entry.strip() for entry in settings.BONSAI_FORWARD) if entry]


def _slug(entry: str) -> str:
    """A name for files; it shows nothing of a password."""
    return f"{entry.partition(':')[0]}-{hashlib.sha256(entry.encode()).hexdigest()[:10]}"


@dataclass
class Cursor:
    """How far one tracker was told one log."""

    sent: int = 0  # points that the tracker has taken
    offset: int = 0  # where reading goes on: byte, number of the line before, number of the point, and the step before
    seq: int = 0
    point: int = 0
    last: int = -1
    ended: str = ""  # the end that the tracker was told
    trouble: str = ""  # why the tracker refused this run

    def rewind(self) -> None:
        """Read the log from its beginning again; what was sent stays counted."""
        self.offset = self.seq = self.point = 0
        self.last = -1


def unsent(log: Path, cursor: Cursor, upto: int) -> Iterator[tuple[list[Point], Cursor]]:
    """What the tracker has not got of the log before byte `upto`: points in pieces, each with the cursor behind it."""
    now = replace(cursor)
    waiting: list[Point] = []
    with log.open("rb") as file:
        if not _goes_on(file, now):
            now.rewind()
        file.seek(now.offset)
        while now.offset < upto:
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            told = parsed(line)
            now.offset += len(line)
            now.seq = told.seq if told is not None else now.seq + 1
            for point in points([told] if told is not None else [], now.last):
                now.last = point.step if point.part == "train" else now.last
                now.point += 1
                if now.point > now.sent:
                    waiting.append(point)
                    now.sent = now.point
            if sum(len(point.values) for point in waiting) >= MOST_NUMBERS:
                yield waiting, replace(now)
                waiting = []
    yield waiting, now


def _goes_on(file: IO[bytes], cursor: Cursor) -> bool:
    """Whether the log continues with the next line where it was left. After a loss of power its end may have been written anew."""
    if not cursor.offset:
        return True
    file.seek(cursor.offset - 1)
    if file.read(1) != b"\n":
        return False
    told = parsed(file.readline())
    return told is None or told.seq == cursor.seq + 1


@dataclass
class _Open:
    """A run that is held open at the tracker, and the lock that keeps others from it."""

    run: Run
    cursor: Cursor
    lock: IO[bytes]
    behind: bool = True  # the time was over before everything was sent


@dataclass
class Forwarder:
    """Tells one tracker about jobs. One thread at a time."""

    target: Target
    open: dict[uuid.UUID, _Open] = field(default_factory=dict)

    def tell(self, job: Job, *, again: bool = False, seconds: float = math.inf) -> int | None:
        """Send what the tracker has not got of a job, and how it ended; returns the number of points, or None when another process is at it.

        After `seconds`, what is left waits for the next time.

        `again` forgets what is known of an earlier time, also that the tracker refused. Raises Away, Refused, or FileNotFoundError for a job
        without a log.
        """
        log = job_folder(job.pk) / LOG_NAME
        if not log.exists():
            raise FileNotFoundError(log)
        opened = self.open.get(job.pk) or self._begin(job, again)
        if opened is None:
            return None
        try:
            num = self._send(job, opened, log, time.monotonic() + seconds)
            if opened.behind:
                return num
            if job.status in TERMINAL:
                opened.run.end(_end(job))
                opened.cursor.ended = job.status
                self._save(job.pk, opened.cursor)
                self._release(job.pk)
            elif job.status not in ACTIVE:
                self._save(job.pk, opened.cursor)
                self.close(job.pk)
            return num
        except Away:  # opened anew, the tracker says how much has arrived
            self.close(job.pk)
            raise
        except Refused as error:
            opened.cursor.trouble = str(error)
            self._save(job.pk, opened.cursor)
            self.close(job.pk)
            raise
        except BaseException:
            self._release(job.pk)
            raise

    def has_news(self, job: Job) -> bool:
        """Whether the tracker has not been told everything of a job; of one that it refused there is none."""
        cursor = self._load(job.pk)
        if cursor.trouble:
            return False
        return cursor.ended != job.status if job.status in TERMINAL else cursor.offset != job.log_offset

    def knows_all(self, job: Job) -> bool:
        """Whether the tracker was told how a job ended, and so everything before."""
        return job.status in TERMINAL and self._load(job.pk).ended == job.status

    def close(self, job_id: uuid.UUID) -> None:
        """Let go of a run for now."""
        opened = self.open.get(job_id)
        if opened is not None:
            try:
                with suppress(Away, Refused):
                    opened.run.close()
            finally:
                self._release(job_id)

    def _begin(self, job: Job, again: bool) -> _Open | None:
        place = self._place(job.pk)
        place.parent.mkdir(exist_ok=True)
        lock = place.with_suffix(".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            cursor = Cursor() if again else self._load(job.pk)
            try:
                run = self.target.tracker.begin(_about(job))
            except Refused as error:
                self._save(job.pk, replace(cursor, trouble=str(error)))
                raise
            cursor.trouble = ""
            if run.known is not None:
                cursor.rewind()
                cursor.sent = run.known
            self.open[job.pk] = _Open(run, cursor, lock)
        except BlockingIOError:
            lock.close()
            return None
        except BaseException:
            lock.close()
            raise
        return self.open[job.pk]

    def _send(self, job: Job, opened: _Open, log: Path, end: float) -> int:
        num, opened.behind = 0, True
        for some, cursor in unsent(log, opened.cursor, job.log_offset):
            if some:
                opened.run.log(some, cursor.sent - len(some))
                self._save(job.pk, cursor)
                num += len(some)
            opened.cursor = cursor
            if some and time.monotonic() >= end:
                return num
        opened.behind = False
        return num

    def _release(self, job_id: uuid.UUID) -> None:
        opened = self.open.pop(job_id, None)
        if opened is not None:
            opened.lock.close()

    def _place(self, job_id: uuid.UUID) -> Path:
        return job_folder(job_id) / "forward" / f"{self.target.slug}.json"

    def _load(self, job_id: uuid.UUID) -> Cursor:
        try:
            return Cursor(**json.loads(self._place(job_id).read_bytes()))
        except (OSError, ValueError, TypeError):
            return Cursor()

    def _save(self, job_id: uuid.UUID, cursor: Cursor) -> None:
        write_json(self._place(job_id), asdict(cursor))


class Follower(threading.Thread):
    """Keeps one tracker up to date, patiently: it waits longer and longer while the tracker is away, and goes on where it was."""

    def __init__(self, target: Target, since: float, stopping: threading.Event) -> None:
        super().__init__(name=target.slug, daemon=True)
        self.forwarder = Forwarder(target)
        self.since = datetime.fromtimestamp(since, UTC)
        self.stopping = stopping
        self._done: set[uuid.UUID] = set()
        self._later: uuid.UUID | None = None  # the job at which the tracker went away: the others come first next time
        self._away = ""

    def run(self) -> None:
        pause = LOOK_SECONDS
        try:
            while not self.stopping.is_set():
                took_it, left = self._look_patiently()
                pause = LOOK_SECONDS if took_it else min(2 * pause, MOST_SECONDS)
                self.stopping.wait(0 if left else pause)
        finally:
            for job_id in list(self.forwarder.open):
                self.forwarder.close(job_id)
            connection.close()

    def look(self) -> bool:
        """Tell the tracker what is new, for a while; returns whether something is left. Raises Away."""
        now, complete = timezone.now(), True
        jobs = self._jobs()
        for job_id in self.forwarder.open.keys() - {job.pk for job in jobs}:  # deleted meanwhile
            self.forwarder.close(job_id)
        for job in sorted(jobs, key=lambda job: job.pk == self._later):
            if self.stopping.is_set():
                return False
            try:
                if job.pk in self.forwarder.open or self.forwarder.has_news(job):
                    complete = self.forwarder.tell(job, seconds=SHARE_SECONDS) is not None and complete
                elif job.status in TERMINAL:
                    self._done.add(job.pk)
            except Refused as error:
                logger.warning("%s takes nothing of job %s. %s", self.forwarder.target, job.pk, error)
            except FileNotFoundError:  # it left no log, or was deleted in this moment
                self.forwarder.close(job.pk)
                if job.status in TERMINAL:
                    self._done.add(job.pk)
            except Away:
                self._later = job.pk
                raise
        left = any(opened.behind for opened in self.forwarder.open.values())
        if complete and not left:
            self.since = max(self.since, now - RECENT)
        return left

    def _jobs(self) -> list[Job]:
        begun = Job.objects.exclude(started_at=None).filter(Q(ended_at=None) | Q(ended_at__gte=self.since))
        return [job for job in begun.order_by("started_at") if job.pk not in self._done]

    def _look_patiently(self) -> tuple[bool, bool]:
        """Whether the tracker took what it was told, and whether something is left."""
        try:
            left = self.look()
        except Away as error:
            if str(error) != self._away:
                self._away = str(error)
                logger.warning(
                    "%s takes nothing now. %s Nothing is lost; it is tried again.", self.forwarder.target, error
                )
            return False, False
        except (OperationalError, InterfaceError) as error:
            logger.warning("The database does not answer (%s); trying again.", error)
            connection.close()
            return False, False
        except Exception:
            logger.exception("%s: a look failed; trying again.", self.forwarder.target)
            return False, False
        if self._away:
            logger.info("%s takes everything again.", self.forwarder.target)
            self._away = ""
        return True, left


def follow(found: list[Target], stopping: threading.Event) -> None:
    """Keep every tracker up to date until told to stop."""
    begun = since()
    threads = [Follower(target, begun[target.slug], stopping) for target in found]
    for thread in threads:
        thread.start()
    stopping.wait()
    for thread in threads:
        thread.join(5.0)


def since() -> dict[str, float]:
    """When each tracker was first named. Runs that ended before are not sent by themselves; a tracker that is named no more is forgotten."""
    path = home() / SINCE
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    begun = {slug: float(known.get(slug, time.time())) for slug in map(_slug, _entries())}
    if begun != known:
        write_json(path, begun)
    return begun


def _about(job: Job) -> About:
    return About(
        job=str(job.pk),
        name=job.name,
        address=f"{_address()}/runs/{job.pk}/",
        params=params(job),
        started=(job.started_at or job.created).timestamp(),
        folder=home() / "trackers",
    )


def _end(job: Job) -> End:
    ended = job.ended_at or timezone.now()
    return End(status=job.status, reason=job.reason, message=job.message, moment=ended.timestamp())


def params(job: Job) -> dict[str, str | int | float | bool]:
    """The recipe by dotted names. Places on this machine's disk stay here: sources are called as they were asked for."""
    asked = {name: value for name, value in _flat(job.request).items() if name.endswith("source")}
    whole = {**_flat(job.recipe), **asked}
    return {
        name: value
        for name, value in whole.items()
        if not (isinstance(value, str) and value.startswith(("file:", "folder:")))
    }


def _flat(value: Any, name: str = "") -> dict[str, str | int | float | bool]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {} if value is None else {name: value}
    return {
        key: item for inner, below in items for key, item in _flat(below, f"{name}.{inner}" if name else inner).items()
    }


def _address() -> str:
    """Where people reach the studio."""
    if settings.CSRF_TRUSTED_ORIGINS:
        return str(settings.CSRF_TRUSTED_ORIGINS[0]).rstrip("/")
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((home() / "up.json").read_bytes())["address"]).rstrip("/")
    return f"http://{settings.BONSAI_HOST}:{settings.BONSAI_PORT}"


def _sentence(error: Exception) -> str:
    words = str(error)
    return words if words.endswith(".") else f"{words}."
