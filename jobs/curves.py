"""The columns of a job's log, kept beside it: charts of long runs read numbers instead of parsing text.

    curves/head.json       how far the log was read, and how much of the two files counts
    curves/<n>.f64         one row of FIELDS for every optimizer step, as the machine writes doubles, NaN where there is no number
    curves/<n>.jsonl       evaluations and signals: {"kind", "step", "data"}

The log is the truth. What is written behind the counts of the head does not exist; the head is renamed into place when the files are on the disk.
When the log does not go on where the head says, or a file is too short, everything is made anew under the next number <n>, so that nobody who
reads is disturbed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from engine.core.events import LOG_NAME

FIELDS = ("step", "samples", "seconds", "loss", "grad_norm", "learning_rate", "grad_norm_corrected")
LAYOUT = (*FIELDS, sys.byteorder)
ROW_BYTES = 8 * len(FIELDS)
PIECE_BYTES = 4 << 20  # of the log, read at once
PIECE_ROWS = 1 << 16  # of the columns, for who reads some at a time
MARKS = ("evaluation", "signal")
Row = tuple[float, ...]
_DOUBLE = struct.Struct("d")
_NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class Head:
    """What counts: up to which byte and line the log was read, the number of the files, and their length."""

    layout: tuple[str, ...] = LAYOUT
    number: int = 0
    offset: int = 0
    seq: int = 0
    rows: int = 0
    marks: int = 0  # bytes


class Curves:
    """The columns of one job. Any number of processes may read on and read at once."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / LOG_NAME
        self.place = folder / "curves"
        self.head = Head()

    def read_on(self, upto: int, *, seconds: float = math.inf) -> Curves:
        """Take what the log holds before byte `upto`, for `seconds` at most (and at least one piece)."""
        self.head = self._read_head()
        if self._is_behind(upto):
            with self._alone():
                self.head = self._read_head()
                end = time.monotonic() + seconds
                while self._is_behind(upto):
                    if not self._take_piece(upto) or time.monotonic() >= end:
                        break
        return self

    def read(self, start: int, end: int) -> dict[str, array[float]]:
        """Rows start … end, by column."""
        flat = array("d")
        if end > start:
            with self._path("f64").open("rb") as file:
                file.seek(start * ROW_BYTES)
                flat.frombytes(file.read((end - start) * ROW_BYTES))
        return {name: flat[place :: len(FIELDS)] for place, name in enumerate(FIELDS)}

    def at_steps(self, steps: Sequence[int]) -> list[dict[str, float] | None]:
        """The row of each step, or the last one before it; None where there is none."""
        places = [self.first_at("step", step + 0.5) - 1 for step in steps]
        return [
            {name: column[0] for name, column in self.read(place, place + 1).items()} if place >= 0 else None
            for place in places
        ]

    def first_at(self, axis: str, value: float) -> int:
        """The first row whose `axis`, which never falls, is at least `value`."""
        if not self.head.rows:
            return 0
        column, low, high = FIELDS.index(axis), 0, self.head.rows
        with self._path("f64").open("rb") as file:
            while low < high:
                middle = (low + high) // 2
                (here,) = _DOUBLE.unpack(os.pread(file.fileno(), 8, middle * ROW_BYTES + 8 * column))
                low, high = (middle + 1, high) if here < value else (low, middle)
        return low

    def marks(self, kind: str) -> list[dict[str, Any]]:
        """Every evaluation or signal: its step and its data."""
        return [{"step": mark["step"], **mark["data"]} for mark in self._all_marks() if mark["kind"] == kind]

    def _all_marks(self) -> list[dict[str, Any]]:
        if not self.head.marks:
            return []
        with self._path("jsonl").open("rb") as file:
            return [json.loads(line) for line in file.read(self.head.marks).splitlines()]

    def _path(self, suffix: str) -> Path:
        return self.place / f"{self.head.number}.{suffix}"

    def _read_head(self) -> Head:
        try:
            values = json.loads((self.place / "head.json").read_bytes())
            return Head(**{**values, "layout": tuple(values["layout"])})
        except FileNotFoundError:
            return Head()
        except (ValueError, TypeError, KeyError):
            return Head(number=-1, layout=())  # of another version: made anew

    def _is_behind(self, upto: int) -> bool:
        return self.head.offset != upto or self.head.layout != LAYOUT

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.place.mkdir(parents=True, exist_ok=True)
        with (self.place / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _take_piece(self, upto: int) -> bool:
        """Append what one piece of the log holds; False when the log holds no more."""
        try:
            log = self.log.open("rb")
        except FileNotFoundError:
            return False
        with log:
            if not self._goes_on(log, upto):
                self._begin_anew()
            log.seek(self.head.offset)
            raw = log.read(min(PIECE_BYTES, upto - self.head.offset))
            if b"\n" not in raw:
                raw += log.readline()
        raw = raw[: raw.rfind(b"\n") + 1]
        if not raw:
            return False
        self._append(raw)
        return True

    def _goes_on(self, log: BinaryIO, upto: int) -> bool:
        """Whether our files are whole and the log continues behind what was read of it with the next number."""
        head = self.head
        if head.layout != LAYOUT or head.offset > upto:
            return False
        if not head.offset:
            return True
        sizes = (path.stat().st_size if path.exists() else 0 for path in (self._path("f64"), self._path("jsonl")))
        if any(size < counted for size, counted in zip(sizes, (head.rows * ROW_BYTES, head.marks), strict=True)):
            return False
        log.seek(head.offset - 1)
        if log.read(1) != b"\n":
            return False
        line = log.readline()
        try:
            return not line.endswith(b"\n") or int(json.loads(line)["seq"]) == head.seq + 1
        except (ValueError, KeyError, TypeError):
            return True  # a damaged line tells nothing

    def _begin_anew(self) -> None:
        old, self.head = self.head, Head(number=self.head.number + 1)
        self._write_head()
        for suffix in ("f64", "jsonl"):  # somebody may still read the files that counted until now
            (self.place / f"{old.number - 1}.{suffix}").unlink(missing_ok=True)

    def _append(self, raw: bytes) -> None:
        head = self.head
        last = self.read(head.rows - 1, head.rows)["step"][0] if head.rows else -1.0
        rows, marks, seq = _columns(raw)
        fresh = array("d", chain.from_iterable(_first_of_each_step(rows, last)))
        text = self._new_marks(marks)
        self._write("f64", head.rows * ROW_BYTES, fresh.tobytes())
        self._write("jsonl", head.marks, text)
        self.head = Head(
            number=head.number,
            offset=head.offset + len(raw),
            seq=max(seq, head.seq),
            rows=head.rows + len(fresh) // len(FIELDS),
            marks=head.marks + len(text),
        )
        self._write_head()

    def _new_marks(self, marks: Sequence[Mapping[str, Any]]) -> bytes:
        """Lines of those marks that are not there yet: after a loss of power the engine says them again."""
        if not marks:
            return b""
        known = {_mark_key(mark) for mark in self._all_marks()}
        lines = []
        for mark in marks:
            if _mark_key(mark) not in known:
                known.add(_mark_key(mark))
                lines.append(json.dumps(mark, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return b"".join(lines)

    def _write(self, suffix: str, offset: int, raw: bytes) -> None:
        if not raw:
            return
        with os.fdopen(os.open(self._path(suffix), os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(offset)  # what a writer left that died before its head
            file.seek(offset)
            file.write(raw)
            file.flush()
            os.fdatasync(file.fileno())

    def _write_head(self) -> None:
        beside = self.place / "head.json.new"
        beside.write_text(json.dumps(asdict(self.head)), encoding="utf-8")
        beside.replace(self.place / "head.json")


def _mark_key(mark: Mapping[str, Any]) -> tuple[str, int, str]:
    return mark["kind"], mark["step"], str(mark["data"].get("key", ""))


def _first_of_each_step(rows: Iterable[Row], last: float) -> Iterator[Row]:
    """Rows whose step is greater than every step before them: a step that was repeated after the log lost its end is left out."""
    for row in rows:
        if row[0] > last:
            last = row[0]
            yield row


def _columns(raw: bytes) -> tuple[list[Row], list[dict[str, Any]], int]:
    """What lines of the log hold: rows (num, FIELDS), marks, and the number of the last line."""
    lines = raw.splitlines()
    try:
        return _gathered(json.loads(b"[" + b",".join(lines) + b"]"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _gathered(body for line in lines if (body := _checked(line)))


def _gathered(bodies: Iterable[Mapping[str, Any]]) -> tuple[list[Row], list[dict[str, Any]], int]:
    rows: list[Row] = []
    marks: list[dict[str, Any]] = []
    seq = 0
    for body in bodies:
        seq, kind = body["seq"], body["kind"]
        if kind == "metric":
            rows += map(_fields, body["data"]["rows"])
        elif kind in MARKS:
            marks.append({"kind": kind, "step": body["step"], "data": body["data"]})
    return rows, marks, seq


def _fields(row: Mapping[str, Any]) -> Row:
    return tuple([_NAN if (value := row.get(name)) is None else float(value) for name in FIELDS])


def _checked(line: bytes) -> dict[str, Any] | None:
    """One line, or None when it is damaged: then it is left out, as ingest does."""
    try:
        body = json.loads(line)
        _gathered([{**body, "seq": int(body["seq"]), "step": int(body["step"]), "data": dict(body["data"])}])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(body)
