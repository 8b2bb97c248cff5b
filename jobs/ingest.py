"""From a child's log into the database: each batch is one transaction, so a crash between reading and committing repeats nothing."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.db import connection, transaction
from django.db.models import F

from engine.core.events import LOG_NAME
from jobs import wake
from jobs.lifecycle import Fenced
from jobs.models import Event, Job

logger = logging.getLogger(__name__)
BATCH_BYTES = 4 << 20
_COLUMNS = ("job_id", "seq", "log_seq", "kind", "step", "time", "data")


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
    )  # log_seq, kind, step, time, data as JSON
    changes: dict[str, Any] = field(default_factory=dict)
    taken: Taken = field(default_factory=Taken)


class Ingester:
    """Reads one job's log from where the database stands. Every write carries the epoch of the lease."""

    def __init__(self, job: Job, folder: Path, epoch: int) -> None:
        self.job_id, self.epoch = job.pk, epoch
        self.path = folder / LOG_NAME
        self.offset, self.log_seq = job.log_offset, job.log_seq

    def drain(self) -> Taken:
        """Take everything that is complete in the log; raises Fenced when the lease was lost."""
        total = Taken()
        while True:
            try:
                with self.path.open("rb") as file:
                    size = file.seek(0, 2)
                    if size < self.offset:
                        # The machine lost power before the end of the log reached the disk. What is known stays known; the
                        # child repeats the lost steps with the same numbers, and readers keep the first row of each step.
                        self.offset = size
                        Job.objects.filter(pk=self.job_id, lease_epoch=self.epoch).update(log_offset=size)
                    file.seek(self.offset)
                    raw = file.read(BATCH_BYTES)
                    if b"\n" not in raw:
                        raw += file.readline()  # one very long line
            except FileNotFoundError:
                return total
            end = raw.rfind(b"\n") + 1
            if not end:
                return total
            batch = self._parse(raw[:end])
            if not self._commit(batch, self.offset + end):
                continue
            total.add(batch.taken)

    def _parse(self, raw: bytes) -> _Batch:
        batch = _Batch()
        for line in raw.splitlines():
            try:
                body = json.loads(line)
                kind, step, data = str(body["kind"]), int(body["step"]), dict(body["data"])
                text = json.dumps(data, separators=(",", ":")).replace("\\u0000", "\\ufffd")  # PostgreSQL stores no NUL
                batch.rows.append((int(body["seq"]), kind, step, float(body["time"]), text))
            except (ValueError, KeyError, TypeError):
                logger.warning("Job %s: a line of the log could not be read and was left out.", self.job_id)
                continue
            _note(batch, kind, step, data)
        batch.taken.num_events = len(batch.rows)
        return batch

    def _commit(self, batch: _Batch, offset: int) -> bool:
        """Write one batch; False when the database was ahead of us (a commit whose answer got lost), so look again."""
        num = len(batch.rows)
        highest = max([self.log_seq, *(row[0] for row in batch.rows)])
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
