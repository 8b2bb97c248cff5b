"""Curves to look at: thinned out so that a browser can draw them, with every spike still there.

Each bucket of neighbouring steps keeps its least, its greatest, its last and its first non-finite value. The numbers come from the columns
beside the log (`jobs.curves`), some at a time, so that neither time nor memory is spent on rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jobs.curves import FIELDS, PIECE_ROWS, Curves
from jobs.models import Job
from jobs.places import job_folder

CURVES = ("loss", "grad_norm", "learning_rate")
AXES = ("step", "samples", "seconds")
Axis = Literal["step", "samples", "seconds"]


@dataclass(frozen=True)
class Window:
    """A stretch of one axis, ends included."""

    axis: Axis = "step"
    start: float | None = None
    end: float | None = None


def series(
    job: Job, points: int = 2000, *, window: Window | None = None, names: Collection[str] = ()
) -> dict[str, Any]:
    """The curves of a job with at most about `points` points each, its evaluations and signals, and where to go on with events.

    Only the rows of `window` and the two beside it, at full resolution where they are few; only the curves that `names` lists, if any,
    and then without the table of evaluations.
    """
    now = Job.objects.filter(pk=job.pk).values_list("last_seq", "log_offset").first()
    last, offset = now or (0, 0)
    rows = Curves(job_folder(job.pk)).read_on(offset)
    evaluations, signals = rows.marks("evaluation"), rows.marks("signal")
    curves = _step_curves(rows, points, _range(rows, window), [name for name in CURVES if not names or name in names])
    curves |= {
        name: curve
        for name, curve in _evaluation_curves(rows, evaluations, points).items()
        if not names or name in names
    }
    samples = rows.at_steps([signal["step"] for signal in signals])[:, FIELDS.index("samples")].tolist()
    body = {
        "last_seq": last,
        "num_steps": rows.head.rows,
        "curves": curves,
        "signals": [{**signal, "samples": _whole(num)} for signal, num in zip(signals, samples, strict=True)],
    }
    return body if names else {**body, "evaluations": evaluations}


def decimate(values: NDArray[np.float64], points: int) -> NDArray[np.int64]:
    """Indices of the values to keep, in order: the first; of each bucket the least, the greatest, the last and the first that is not finite."""
    return _kept(values, bucket_edges(len(values), points))


def bucket_edges(num: int, points: int) -> NDArray[np.int64]:
    """Where buckets begin and end, for `num` values of which about `points` are kept at most. The first value is a bucket of its own."""
    if num <= points:
        return np.arange(num + 1)
    return np.concatenate(([0], np.linspace(1, num, max(1, (points - 1) // 4) + 1).astype(np.int64)))


def _kept(values: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """What `decimate` keeps of the buckets between `edges`, which begin at 0 and end at the number of values."""
    if len(edges) == len(values) + 1:
        return np.arange(len(values))
    finite = np.isfinite(values)
    kept = [edges[1:] - 1]
    for empty, extreme in ((np.inf, np.minimum), (-np.inf, np.maximum)):
        filled = np.where(finite, values, empty)
        extremes = np.repeat(extreme.reduceat(filled, edges[:-1]), np.diff(edges))
        kept.append(_first_of_buckets(finite & (filled == extremes), edges))
    kept.append(_first_of_buckets(~finite, edges))
    return np.unique(np.concatenate(kept))


def _first_of_buckets(hit: NDArray[np.bool_], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first hit of each bucket that has one."""
    where = np.flatnonzero(hit)
    place = np.searchsorted(where, edges)
    return where[place[:-1][place[:-1] < place[1:]]]


def _range(rows: Curves, window: Window | None) -> tuple[int, int]:
    """Which rows to show: those of the window, and one more at each side, so that lines leave the picture at its edge."""
    num = rows.head.rows
    if window is None:
        return 0, num
    start = 0 if window.start is None else rows.first_at(window.axis, window.start)
    end = num if window.end is None else rows.first_at(window.axis, math.nextafter(window.end, math.inf))
    return max(0, start - 1), min(num, max(start, end) + 1)


def _step_curves(rows: Curves, points: int, shown: tuple[int, int], names: Sequence[str]) -> dict[str, Any]:
    """Decimated curves of the rows start … end."""
    start, end = shown
    edges = start + bucket_edges(end - start, points)
    chosen: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    bucket = 0
    while bucket < len(edges) - 1:  # a number of whole buckets at a time
        stop = max(bucket + 1, int(np.searchsorted(edges, edges[bucket] + PIECE_ROWS, "right")) - 1)
        part = rows.read(int(edges[bucket]), int(edges[stop]))
        for name, kept in chosen.items():
            kept.append(part[_kept(part[:, FIELDS.index(name)], edges[bucket : stop + 1] - edges[bucket])])
        bucket = stop
    curves = {name: np.concatenate(kept) for name, kept in chosen.items() if kept}
    return {
        name: _curve({column: values[:, FIELDS.index(column)] for column in (*AXES, name)}, name)
        for name, values in curves.items()
    }


def _curve(columns: Mapping[str, NDArray[np.float64]], name: str) -> dict[str, list[Any]]:
    curve: dict[str, list[Any]] = {"value": [_number(value) for value in columns[name].tolist()]}
    for axis in AXES:
        values = columns[axis]
        curve[axis] = (
            [_number(value) for value in values.tolist()]
            if axis == "seconds"
            else np.nan_to_num(values).astype(np.int64).tolist()
        )
    return curve


def _evaluation_curves(rows: Curves, evaluations: Sequence[Mapping[str, Any]], points: int) -> dict[str, Any]:
    """One curve for every number that is measured on held-out rows."""
    names = sorted(
        {key for row in evaluations for key, value in row.items() if key.startswith("eval_") and _is_number(value)}
    )
    if not names:
        return {}
    known = rows.at_steps([row["step"] for row in evaluations])
    columns = {
        "step": np.array([row["step"] for row in evaluations], dtype=np.float64),
        "samples": np.array([row.get("samples") or 0 for row in evaluations], dtype=np.float64),
        "seconds": np.nan_to_num(known[:, FIELDS.index("seconds")]),
    }
    curves = {}
    for name in names:
        values = [row[name] if _is_number(row.get(name)) else math.nan for row in evaluations]
        columns[name] = np.array(values, dtype=np.float64)
        kept = decimate(columns[name], points)
        curves[name] = _curve({column: columns[column][kept] for column in (*AXES, name)}, name)
    return curves


def _whole(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> float | None:
    """Seven digits are more than a screen shows; what is not finite is null, because JSON has no NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
