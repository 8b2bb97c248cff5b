"""Curves to look at: thinned out so that a browser can draw them, with every spike still there.

Each bucket of neighbouring steps keeps its least, its greatest, its last and its first non-finite value. What was read once stays in
memory, so that a running job costs only its new rows. numpy is loaded by the first curve that has to be thinned out: the web process stays small.
"""

from __future__ import annotations

import math
import threading
import uuid
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.core.events import LOG_NAME, read_events
from jobs.models import Event, Job
from jobs.places import job_folder

CURVES = ("loss", "grad_norm", "learning_rate")
AXES = ("step", "samples", "seconds")
MAX_KEPT_ROWS = 4_000_000
KINDS = ("metric", "evaluation", "signal")


class Rows:
    """Every step of one job, as columns."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self.columns = {name: array("d") for name in (*AXES, *CURVES)}
        self.evaluations: list[dict[str, Any]] = []
        self.signals: list[dict[str, Any]] = []
        self.last_seq = 0

    def __len__(self) -> int:
        return len(self.columns["step"])

    def add(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        if kind == "metric":
            self._add_steps(data.get("rows", ()))
        elif kind == "evaluation":
            self.evaluations.append({"step": step, **data})
        elif kind == "signal":
            self.signals.append({"step": step, **data})

    def _add_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        steps = self.columns["step"]
        last = steps[-1] if steps else -1.0
        others = [(name, column) for name, column in self.columns.items() if name != "step"]
        for row in rows:
            step = row["step"]
            if step <= last:  # a step that was repeated after the log lost its end
                continue
            last = step
            steps.append(step)
            for name, column in others:
                value = row.get(name)
                column.append(math.nan if value is None else value)


_kept: OrderedDict[uuid.UUID, Rows] = OrderedDict()
_lock = threading.Lock()


def series(job: Job, points: int = 2000) -> dict[str, Any]:
    """The curves of a job with at most about `points` points each, its evaluations and signals, and where to go on with events."""
    rows = _rows(job)
    with rows.lock:
        _read_on(job, rows)
        columns = {name: column[:] for name, column in rows.columns.items()}
        evaluations, signals, last = list(rows.evaluations), list(rows.signals), rows.last_seq
    curves = {name: _thinned(columns, name, points) for name in CURVES}
    curves |= _evaluation_curves(evaluations, columns, points)
    samples_at = dict(zip(columns["step"], columns["samples"], strict=True)) if signals else {}
    return {
        "last_seq": last,
        "num_steps": len(columns["step"]),
        "curves": {name: curve for name, curve in curves.items() if curve["value"]},
        "evaluations": evaluations,
        "signals": [{**signal, "samples": samples_at.get(signal["step"])} for signal in signals],
    }


def decimate(column: Sequence[float], points: int) -> Sequence[int]:
    """Indices of the values to keep, in order: of each bucket the least, the greatest, the last and the first that is not finite."""
    num = len(column)
    if num <= points:
        return range(num)
    import numpy as np

    values = np.asarray(column, dtype=np.float64)
    buckets = max(1, points // 4)
    edges = np.linspace(0, num, buckets + 1).astype(np.int64)
    starts = edges[:-1]
    bucket_of = np.repeat(np.arange(buckets), np.diff(edges))
    finite = np.isfinite(values)
    kept = [edges[1:] - 1]
    for filled, extreme in (
        (np.where(finite, values, np.inf), np.minimum),
        (np.where(finite, values, -np.inf), np.maximum),
    ):
        hit = finite & (filled == extreme.reduceat(filled, starts)[bucket_of])
        where = np.flatnonzero(hit)
        _, first = np.unique(bucket_of[where], return_index=True)
        kept.append(where[first])
    odd = np.flatnonzero(~finite)
    _, first = np.unique(bucket_of[odd], return_index=True)
    kept.append(odd[first])
    indices: list[int] = np.unique(np.concatenate(kept)).tolist()
    return indices


def _rows(job: Job) -> Rows:
    with _lock:
        rows = _kept.pop(job.pk, None) or Rows()
        _kept[job.pk] = rows
        total = sum(map(len, _kept.values()))
        while total > MAX_KEPT_ROWS and len(_kept) > 1:
            total -= len(_kept.popitem(last=False)[1])
        return rows


def _read_on(job: Job, rows: Rows) -> None:
    """Read what is new. Rows that were pruned from the database are read from the log, which keeps everything."""
    now = Job.objects.filter(pk=job.pk).values_list("last_seq", "first_seq").first()
    if now is None:
        return
    last, first = now
    if rows.last_seq + 1 < first:
        _read_pruned(job, rows, first)
    events = Event.objects.filter(job_id=job.pk, seq__gt=rows.last_seq, seq__lte=last, kind__in=KINDS).order_by("seq")
    for kind, step, data in events.values_list("kind", "step", "data").iterator(chunk_size=2000):
        rows.add(kind, step, data)
    rows.last_seq = last


def _read_pruned(job: Job, rows: Rows, first: int) -> None:
    rows.clear()  # begin anew: the log numbers its lines differently
    kept = (
        Event.objects.filter(job_id=job.pk, seq__gte=first, log_seq__isnull=False)
        .order_by("seq")
        .values_list("log_seq", flat=True)
        .first()
    )
    path = job_folder(job.pk) / LOG_NAME
    if path.exists():
        for event, _ in read_events(path):
            if kept is not None and event.seq >= kept:
                break
            if event.kind in KINDS:
                rows.add(event.kind, event.step, event.data)
    rows.last_seq = first - 1


def _thinned(columns: Mapping[str, Sequence[float]], name: str, points: int) -> dict[str, list[Any]]:
    chosen = decimate(columns[name], points)
    if not chosen:
        return {"value": []}
    curve: dict[str, list[Any]] = {"value": [_number(columns[name][index]) for index in chosen]}
    for axis in AXES:
        picked = [columns[axis][index] for index in chosen]
        curve[axis] = [_number(value) if axis == "seconds" else int(value) for value in picked]
    return curve


def _evaluation_curves(
    evaluations: list[dict[str, Any]], columns: Mapping[str, Sequence[float]], points: int
) -> dict[str, Any]:
    """One curve for every number that is measured on held-out rows."""
    names = sorted(
        {key for row in evaluations for key, value in row.items() if key.startswith("eval_") and _is_number(value)}
    )
    axes = {
        "step": [float(row["step"]) for row in evaluations],
        "samples": [float(row.get("samples") or 0) for row in evaluations],
        "seconds": [_seconds_at(row["step"], columns["step"], columns["seconds"]) for row in evaluations],
    }
    curves = {}
    for name in names:
        values = [float(row[name]) if _is_number(row.get(name)) else math.nan for row in evaluations]
        curves[name] = _thinned({**axes, name: values}, name, points)
    return curves


def _seconds_at(step: float, steps: Sequence[float], seconds: Sequence[float]) -> float:
    """When a step was over: between two known steps on the line between them, before the first 0, behind the last as then."""
    after = bisect_right(steps, step)
    if not after:
        return 0.0
    before = after - 1
    if after == len(steps):
        return seconds[before]
    share = (step - steps[before]) / (steps[after] - steps[before])
    return seconds[before] + share * (seconds[after] - seconds[before])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> float | None:
    """Seven digits are more than a screen shows; what is not finite is null, because JSON has no NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
