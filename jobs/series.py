"""Curves to look at: thinned out so that a browser can draw them, with every spike still there.

Each bucket of neighbouring steps keeps its least, its greatest, its last and its first non-finite value. The numbers come from the columns
beside the log (`jobs.curves`), some at a time, so that neither time nor memory is spent on rows.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from jobs.curves import PIECE_ROWS, Curves
from jobs.models import Job
from jobs.places import job_folder

CURVES = ("loss", "grad_norm", "learning_rate", "grad_norm_corrected")
SOMETIMES = ("grad_norm_corrected",)  # not every run can measure it
AXES = ("step", "samples", "seconds")
MANY = 20_000  # so many values at once are worth loading numpy
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
    places = rows.at_steps([signal["step"] for signal in signals])
    body = {
        "last_seq": last,
        "num_steps": rows.head.rows,
        "curves": curves,
        "signals": [
            {**signal, "samples": place and int(place["samples"])}
            for signal, place in zip(signals, places, strict=True)
        ],
    }
    return body if names else {**body, "evaluations": evaluations}


def decimate(values: array[float], points: int) -> list[int]:
    """Indices of the values to keep, in order: the first; of each bucket the least, the greatest, the last and the first that is not finite."""
    return _kept(values, bucket_edges(len(values), points))


def bucket_edges(num: int, points: int) -> list[int]:
    """Where buckets begin and end, for `num` values of which about `points` are kept at most. The first value is a bucket of its own."""
    if num <= points:
        return list(range(num + 1))
    buckets = max(1, (points - 1) // 4)
    return [0, *(1 + (num - 1) * place // buckets for place in range(buckets + 1))]


def _kept(values: array[float], edges: Sequence[int]) -> list[int]:
    """What `decimate` keeps of the buckets between `edges`, which begin at 0 and end at the number of values."""
    if len(edges) == len(values) + 1:
        return list(range(len(values)))
    return (kept_of_many if len(values) >= MANY else kept_of_few)(values, edges)


def kept_of_few(values: array[float], edges: Sequence[int]) -> list[int]:
    """Bucket by bucket, without numpy."""
    kept = set()
    for start, end in pairwise(edges):
        part = values[start:end]
        kept.add(end - 1)
        finite = part.tolist()
        if not math.isfinite(sum(part)):  # one of them is not finite, or their sum is not
            odd = next((place for place, value in enumerate(part) if not math.isfinite(value)), None)
            if odd is not None:
                kept.add(start + odd)
            finite = [value for value in part if math.isfinite(value)]
        if finite:
            kept |= {start + part.index(min(finite)), start + part.index(max(finite))}
    return sorted(kept)


def kept_of_many(values: array[float], edges: Sequence[int]) -> list[int]:
    """The same indices as `kept_of_few`, all buckets at once. Only long runs load numpy: the web process stays small."""
    import numpy as np

    column, borders = np.frombuffer(values), np.array(edges)

    def first_hits(hit: Any) -> Any:
        where = np.flatnonzero(hit)
        place = np.searchsorted(where, borders)
        return where[place[:-1][place[:-1] < place[1:]]]

    finite = np.isfinite(column)
    kept = [borders[1:] - 1, first_hits(~finite)]
    for empty, extreme in ((np.inf, np.minimum), (-np.inf, np.maximum)):
        filled = np.where(finite, column, empty)
        extremes = np.repeat(extreme.reduceat(filled, borders[:-1]), np.diff(borders))
        kept.append(first_hits(finite & (filled == extremes)))
    indices: list[int] = np.unique(np.concatenate(kept)).tolist()
    return indices


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
    edges = bucket_edges(end - start, points)
    chosen: dict[str, dict[str, list[float]]] = {name: {column: [] for column in (*AXES, "value")} for name in names}
    bucket = 0
    while bucket < len(edges) - 1:  # a number of whole buckets at a time
        stop = max(bucket + 1, bisect_right(edges, edges[bucket] + PIECE_ROWS) - 1)
        part = rows.read(start + edges[bucket], start + edges[stop])
        inside = [edge - edges[bucket] for edge in edges[bucket : stop + 1]]
        for name, curve in chosen.items():
            values = part[name]
            kept = _kept(values, inside)
            curve["value"] += [values[place] for place in kept]
            for axis in AXES:
                curve[axis] += [part[axis][place] for place in kept]
        bucket = stop
    told = {name: curve for name, curve in chosen.items() if curve["value"]}
    return {
        name: _spoken(curve)
        for name, curve in told.items()
        if name not in SOMETIMES or any(map(math.isfinite, curve["value"]))
    }


def _spoken(curve: Mapping[str, Sequence[float]]) -> dict[str, list[Any]]:
    """Numbers as they travel: seven digits are more than a screen shows, and what is not finite is null, because JSON has no NaN."""
    return {
        name: [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
        if name in ("value", "seconds")
        else [int(value) if math.isfinite(value) else 0 for value in values]
        for name, values in curve.items()
    }


def _evaluation_curves(rows: Curves, evaluations: Sequence[Mapping[str, Any]], points: int) -> dict[str, Any]:
    """One curve for every number that is measured on held-out rows."""
    names = sorted(
        {
            key
            for row in evaluations
            for key, value in row.items()
            if (key.startswith("eval_") or key == "general_loss") and _is_number(value)
        }
    )
    if not names:
        return {}
    columns = {
        "step": [float(row["step"]) for row in evaluations],
        "samples": [float(row.get("samples") or 0) for row in evaluations],
        "seconds": [row["seconds"] if row else 0.0 for row in rows.at_steps([row["step"] for row in evaluations])],
    }
    curves = {}
    for name in names:
        values = array("d", [row[name] if _is_number(row.get(name)) else math.nan for row in evaluations])
        kept = decimate(values, points)
        curves[name] = _spoken(
            {column: [numbers[place] for place in kept] for column, numbers in {"value": values, **columns}.items()}
        )
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
