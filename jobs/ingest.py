"""From a child's log into the database: each batch is one transaction, so a crash between reading and committing repeats nothing.

What the database shows is on the disk: the log is synced before a batch is committed. In a backlog, metric lines that follow each other share
one row, as the engine itself lets the rows of quick steps share a line; their text is joined, not parsed, and the database checks that it is JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from django.db import DataError, IntegrityError, connection, transaction
from django.db.models import F

from engine.core.events import LOG_NAME
from jobs import wake
from jobs.lifecycle import Fenced
from jobs.models import Event, Job

logger = logging.getLogger(__name__)
BATCH_BYTES = 4 << 20
BACKLOG_LINES = 1000  # so many lines at once are a backlog
SHARED_BYTES = 64 << 10  # about so much of a backlog becomes one event
_COLUMNS = ("job_id", "seq", "log_seq", "kind", "step", "time", "data")
# A metric line as the engine writes it, its rows as one text; and any other line.
_LINE = re.compile(
    r'\{"seq":(\d+),"time":(\d+\.\d+),"kind":"metric","step":(\d+),"data":\{"rows":\[(\{.*\})\]\}\}\n|(.+)\n'
)


@dataclass
class Taken:
    """What a look at the log brought."""

    num_events: int = 0
    states: list[str] = field(default_factory=list)
    message: str = ""  # what the child says it is doing

    def add(self, other: Taken) -> None:
        self.num_events += other.num_events
        self.states += other.states
        self.message = other.message or self.message


@dataclass
class _Batch:
    rows: list[tuple[int, str, int, float, str]] = field(
        default_factory=list
    )  # log_seq (of its first line), kind, step, time, data as JSON
    highest: int = 0  # log_seq of the last line
    changes: dict[str, Any] = field(default_factory=dict)
    taken: Taken = field(default_factory=Taken)


@dataclass(frozen=True)
class _Piece:
    """Whole lines of the log, which are on the disk; for a backlog also joined, unless a line among them is not what the engine writes."""

    start: int
    raw: bytes
    joined: _Batch | None

    @property
    def end(self) -> int:
        return self.start + len(self.raw)


class Ingester:
    """Reads one job's log from where the database stands. Every write carries the epoch of the lease."""

    def __init__(self, job: Job, folder: Path, epoch: int) -> None:
        self.job_id, self.epoch = job.pk, epoch
        self.path = folder / LOG_NAME
        self.offset, self.log_seq = job.log_offset, job.log_seq

    def drain(self) -> Taken:
        """Take everything that is complete in the log by now; raises Fenced when the lease was lost.

        What is written meanwhile is left for the next look: a log that always grows would keep the caller from everything else.
        """
        total = Taken()
        end = self.path.stat().st_size if self.path.exists() else 0
        with contextlib.ExitStack() as stack:
            second: ThreadPoolExecutor | None = None  # reads on in a backlog, while the database writes
            piece = self._piece()
            while piece is not None:
                reading = None
                if len(piece.raw) >= BATCH_BYTES // 2 and piece.end < end:
                    second = second or stack.enter_context(ThreadPoolExecutor(1, "ingest"))
                    reading = second.submit(_read, self.path, piece.end)
                taken = self._take(piece)
                if taken is not None:
                    total.add(taken)
                if self.offset >= end:
                    break
                ahead = reading.result() if reading is not None else None
                piece = ahead if ahead is not None and ahead.start == self.offset else self._piece()
        return total

    def _piece(self) -> _Piece | None:
        """What comes next in the log."""
        size = self.path.stat().st_size if self.path.exists() else self.offset
        if size < self.offset:
            # The machine lost power before the end of the log reached the disk. What is known stays known; the
            # child repeats the lost steps with the same numbers, and readers keep the first row of each step.
            self.offset = size
            Job.objects.filter(pk=self.job_id, lease_epoch=self.epoch).update(log_offset=size)
        return _read(self.path, self.offset)

    def _take(self, piece: _Piece) -> Taken | None:
        """Write these lines; None when the database was ahead of us, so that one has to look again."""
        if piece.joined is not None:
            try:
                return piece.joined.taken if self._commit(piece.joined, piece.end) else None
            except (IntegrityError, DataError) as error:
                logger.info("Job %s: a piece of the log is read line by line: %s", self.job_id, error)
        batch = _Batch()
        for line in piece.raw.splitlines():
            self._add(batch, line)
        return batch.taken if self._commit(batch, piece.end) else None

    def _add(self, batch: _Batch, line: bytes) -> None:
        try:
            _add_line(batch, line)
        except (ValueError, KeyError, TypeError):
            logger.warning("Job %s: a line of the log could not be read and was left out.", self.job_id)

    def _commit(self, batch: _Batch, offset: int) -> bool:
        """Write one batch; False when the database was ahead of us (a commit whose answer got lost), so look again."""
        num = len(batch.rows)
        highest = max(self.log_seq, batch.highest)
        with transaction.atomic():
            moved = Job.objects.filter(pk=self.job_id, lease_epoch=self.epoch, log_offset=self.offset).update(
                last_seq=F("last_seq") + num, log_offset=offset, log_seq=highest, **batch.changes
            )
            if not moved:
                self._catch_up()
                return False
            last = Job.objects.values_list("last_seq", flat=True).get(pk=self.job_id)
            _insert(self.job_id, last - num + 1, batch.rows, self.log_seq)
            wake.ring_on_commit(str(self.job_id))
        self.offset, self.log_seq = offset, highest
        return True

    def _catch_up(self) -> None:
        now = Job.objects.filter(pk=self.job_id).values_list("lease_epoch", "log_offset", "log_seq").first()
        if now is None or now[0] != self.epoch:
            raise Fenced("Another worker reads this log now.")
        _, self.offset, self.log_seq = now


def _read(path: Path, start: int) -> _Piece | None:
    """The next lines behind byte `start`; None when there is no whole line."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(BATCH_BYTES)
            if b"\n" not in raw:
                raw += file.readline()  # one very long line
            raw = raw[: raw.rfind(b"\n") + 1]
            if not raw:
                return None
            os.fsync(file.fileno())
    except FileNotFoundError:
        return None
    joined = None
    if raw.count(b"\n") >= BACKLOG_LINES:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            joined = _joined(raw.decode())
    return _Piece(start, raw, joined)


def _joined(text: str) -> _Batch:
    """A backlog: neighbouring metric lines become one event. Raises what reading a damaged line raises."""
    batch = _Batch()
    lines = _LINE.findall(text)
    most = max(1, SHARED_BYTES * len(lines) // len(text))
    start = 0
    for end in [*(place for place, line in enumerate(lines) if line[4]), len(lines)]:
        for first in range(start, end, most):
            _share(batch, lines[first : min(first + most, end)])
        if end < len(lines):
            _add_line(batch, lines[end][4])
        start = end + 1
    return batch


def _share(batch: _Batch, lines: list[tuple[str, str, str, str, str]]) -> None:
    """One event for these metric lines (seq, time, step, rows): the number of the first, the time and the step of the last.

    Rows that hold objects of their own are refused: only flat ones can be joined without looking into them.
    """
    last, moment, step, rows, _ = lines[-1]
    joined = ",".join([line[3] for line in lines])
    num = joined.count("{")
    if num != len(lines) and not num == joined.count("}") == joined.count("},{") + 1:
        raise ValueError("A metric row is not flat.")
    batch.rows.append((int(lines[0][0]), "metric", int(step), float(moment), _storable(f'{{"rows":[{joined}]}}')))
    batch.highest = max(batch.highest, int(last))
    batch.taken.num_events += len(lines)
    _note(batch, "metric", int(step), {"rows": json.loads(f"[{rows}]", parse_constant=_refuse)})


def _add_line(batch: _Batch, line: str | bytes) -> None:
    body = json.loads(line, parse_constant=_refuse)
    seq, kind, step, data = int(body["seq"]), str(body["kind"]), int(body["step"]), dict(body["data"])
    batch.rows.append((seq, kind, step, float(body["time"]), _storable(json.dumps(data, separators=(",", ":")))))
    batch.highest = max(batch.highest, seq)
    batch.taken.num_events += 1
    _note(batch, kind, step, data)


def _storable(text: str) -> str:
    return text.replace("\\u0000", "\\ufffd") if "\\" in text else text  # PostgreSQL stores no NUL


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}.")


def _note(batch: _Batch, kind: str, step: int, data: dict[str, Any]) -> None:
    """Keep the newest of what lists and headers show."""
    changes = batch.changes
    if kind == "metric" and data.get("rows"):
        row = data["rows"][-1]
        changes |= {"loss": row.get("loss"), "done_steps": row.get("step", step)}
    elif kind == "progress":
        changes |= {
            "done_steps": data.get("done_steps", step),
            "total_steps": data.get("total_steps", 0),
            "eta_seconds": data.get("eta_seconds"),
        }
    elif kind == "evaluation":
        changes["metrics"] = {**data, "step": step}
    elif kind == "signal":
        changes["last_signal"] = {**data, "step": step}
    elif kind == "checkpoint":
        changes["crashes"] = 0  # it went on since the last crash, so it is not failing in a circle
    elif kind == "state":
        batch.taken.states.append(str(data.get("state")))
        batch.taken.message = changes["message"] = str(data.get("message", ""))
    elif kind == "child":
        changes["total_steps"] = data.get("total_steps") or 0


def _insert(job_id: Any, first: int, rows: list[tuple[int, str, int, float, str]], known: int) -> None:
    """Insert rows in bulk. Model instances would cost five times as much as the database does."""
    if not rows:
        return
    names = ", ".join(connection.ops.quote_name(name) for name in _COLUMNS)
    marks = ", ".join(["%s"] * len(_COLUMNS))
    job = Job._meta.pk.get_db_prep_value(job_id, connection)
    values = [
        (job, first + index, log_seq if log_seq > known else None, kind, step, moment, data)
        for index, (log_seq, kind, step, moment, data) in enumerate(rows)
    ]
    with connection.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO {connection.ops.quote_name(Event._meta.db_table)} ({names}) VALUES ({marks})", values
        )
