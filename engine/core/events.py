"""Events: numbered, typed, append-only. The log is the truth.

One JSON object a line in `events.jsonl`:
    {"seq": 1, "time": 1790000000.123, "kind": "metric", "step": 12, "data": {...}}

kind        data
state       {"state": "starting" | "running" | "evaluating" | "exporting" | "paused" | "stopping" | "done", "message": sentence}
metric      {"rows": [{"step", "samples", "tokens", "epoch", "loss", "grad_norm", "learning_rate", "seconds", "tokens_per_second", "memory"}, …]}
            one row for every optimizer step; several rows share an event when steps are quick. Besides, as far as they are known:
            "grad_norm_corrected" (without the noise of batches), "noise_scale" (samples at which signal and noise are equal), "clipped_share"
            (of the steps so far), "micro_norm", and whatever the parts of the run count
evaluation  {"eval_loss": …, "eval_accuracy": …, "samples": …, "best": bool, "learners": {"count": parameters that learn,
            "idle": share of them whose corrections have all been zero, "size": their length}, …}
progress    {"done_steps", "total_steps", "fraction", "eta_seconds"}
log         {"level": "info" | "warning" | "error", "message": sentence}
sample      {"prompt": …, "output": …, "expected": …, "key"}: at the end, and at every measurement with a key that begins with "live-"
signal      {"action": "note" | "warn" | "save" | "stop", "rule": slug, "message": sentence, "numbers": {…}}
            and, where one click can help, "remedy": {"title": what a button says, "start": "last_good" | "beginning",
            "changes": {dotted recipe name: new value, e.g. "settings.learning_rate": 1e-5, "methods.0.params.max_norm": 1.0}}
checkpoint  {"path": relative folder, "best": bool}
artifact    {"path": "artifact", "files": […], "certificate": "pass" | "fail"}
trial       {"trial": number, "state": engine.core.method.TRIAL_STATES, "done": its step, "total": its last step, "score", "values": {name: value},
             "message": sentence} of a search, whenever one of these has changed
override    {"number", "trial", "verdict": "keep" | "stop", "by": name, "taken": bool, "message": sentence}: a search has taken up what a person decided about a
             trial, or says why it is too late (engine.core.overrides)
child       {"attempt", "pid", "device", …} once at the start of each attempt

A number that is not finite is written as null and named in "nonfinite": ["loss"], because JSON has no NaN.
Numbers grow by one without a hole. After a resume the replayed steps are not written again: (kind, step, key) is written once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "state",
    "metric",
    "evaluation",
    "progress",
    "log",
    "sample",
    "signal",
    "checkpoint",
    "artifact",
    "child",
    "trial",
    "override",
]
LOG_NAME = "events.jsonl"
MOST_ROWS = 1000  # of one metric event
_ONCE: frozenset[str] = frozenset({"evaluation", "sample", "signal", "trial", "override"})
_SYNCED: frozenset[str] = frozenset({"state", "signal", "artifact", "checkpoint", "child", "override"})
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log."""

    seq: int
    time: float
    kind: str
    step: int
    data: dict[str, Any]

    def line(self) -> bytes:
        body = {"seq": self.seq, "time": self.time, "kind": self.kind, "step": self.step, "data": self.data}
        try:
            text = _encode(body)
        except ValueError:  # a number that is not finite; looking for one beforehand would cost as much as writing
            text = _encode({**body, "data": finite(self.data)})
        return text.encode() + b"\n"


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Yield (event, offset behind it) from a byte offset on; a torn last line is left for the next call."""
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            body = json.loads(raw)
            yield Event(body["seq"], body["time"], body["kind"], body["step"], body["data"]), offset


class EventLog:
    """The writing end. Metric rows gather for `interval` seconds and are written as one event; everything else goes out at once."""

    def __init__(self, folder: Path, *, interval: float = 0.25) -> None:
        self.path = folder / LOG_NAME
        self.interval = interval
        self._rows: list[dict[str, Any]] = []
        self._last_flush = time.monotonic()
        self._written: set[tuple[str, int, str]] = set()
        self._metric_step = -1
        self.seq = 0
        end = 0
        if self.path.exists():
            for event, offset in read_events(self.path):
                self._remember(event)
                end = offset
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(end)  # a line torn by a crash was never an event
        self._end = end

    def emit(self, kind: Kind, data: dict[str, Any], *, step: int = 0, key: str = "") -> None:
        """Append one event. A replayed (kind, step, key) of a deterministic kind is skipped."""
        if kind in _ONCE:
            if (kind, step, key) in self._written:
                return
            data = {**data, "key": key} if key else data
        self.flush()
        self._append(kind, data, step)

    def metric(self, row: dict[str, Any]) -> None:
        """Add the row of one optimizer step; steps that the log already holds are skipped."""
        if row["step"] <= self._metric_step:
            return
        self._metric_step = row["step"]
        self._rows.append(row)
        if len(self._rows) >= MOST_ROWS or time.monotonic() - self._last_flush >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Write gathered metric rows."""
        if self._rows:
            self._append("metric", {"rows": self._rows}, self._rows[-1]["step"])
            self._rows = []
        self._last_flush = time.monotonic()

    def sync(self) -> None:
        """Flush and wait until the log is on the disk."""
        self.flush()
        self.settle()

    def settle(self) -> None:
        """Wait until all that was flushed is on the disk; any thread may call it. A checkpoint gets its name only afterwards."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()

    def _append(self, kind: str, data: dict[str, Any], step: int) -> None:
        event = Event(self.seq + 1, round(time.time(), 3), kind, step, data)
        self._put(event.line())
        if kind in _SYNCED:
            os.fsync(self._file.fileno())
        self._remember(event)

    def _put(self, line: bytes) -> None:
        """Write a line, or leave the log as it was: on a full disk nothing of it may come out later, beside a line with the same number."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(line)

    def _remember(self, event: Event) -> None:
        self.seq = event.seq
        if event.kind in _ONCE:
            self._written.add((event.kind, event.step, str(event.data.get("key", ""))))
        elif event.kind == "metric":
            self._metric_step = max(self._metric_step, event.data["rows"][-1]["step"])


def finite(value: Any) -> Any:
    """Replace non-finite numbers by None, naming them beside the place in a "nonfinite" list."""
    if isinstance(value, dict):
        bad = [key for key, item in value.items() if isinstance(item, float) and not math.isfinite(item)]
        out = {key: None if key in bad else finite(item) for key, item in value.items()}
        return {**out, "nonfinite": bad} if bad else out
    if isinstance(value, list | tuple):
        return [None if isinstance(item, float) and not math.isfinite(item) else finite(item) for item in value]
    return value
