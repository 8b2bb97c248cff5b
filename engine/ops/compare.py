"""Results side by side: the scores of each with a bootstrap interval, paired differences where all were measured on the same examples, and their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.artifact import HELDOUT

Values = NDArray[np.float64]
RESAMPLES, SEED, LEVEL = 2000, 17, 0.95
MOST_ROWS = 200
TITLES = {"loss": "eval_loss", "right": "eval_accuracy"}


def compare(artifacts: Sequence[Path | None]) -> dict[str, Any]:
    """What the held-out examples of several results say; None stands for a run without a result.

    Intervals are percentile bootstrap intervals over examples (Efron 1979); losses are weighted by tokens.

    runs: for each result {score: {value, low, high}} and the number of examples; empty for a result that kept none.
    paired: whether all were measured on the same examples in the same order. Then differences: for each result {score: {value, low, high}}, its
    score minus that of the first, from resamples that draw the same examples for both.
    rows: examples that all of them answered, [{prompt, expected, outputs, right}], those on which they differ first.
    """
    kept = [_read(folder) for folder in artifacts]
    paired = len(kept) > 1 and all(kept) and all(_same_examples(kept[0], other) for other in kept[1:])
    runs = [{"num": len(rows), **_intervals(rows)} for rows in kept]
    differences = [_differences(kept[0], other) for other in kept] if paired else []
    return {"runs": runs, "paired": paired, "differences": differences, "rows": _side_by_side(kept) if paired else []}


def _read(folder: Path | None) -> list[dict[str, Any]]:
    if folder is None:
        return []
    try:
        body = json.loads((folder / HELDOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in body if isinstance(row, dict)] if isinstance(body, list) else []


def _same_examples(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> bool:
    keys = [[(row.get("row"), row.get("weight"), row.get("prompt")) for row in rows] for rows in (one, other)]
    return keys[0] == keys[1]


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[Values, Values]]:
    """(values [n], weights [n]) of each score that every example has; an example without one is left out by weight zero."""
    found = {}
    for key, title in TITLES.items():
        known = np.array([row.get(key) is not None for row in rows], bool)
        if known.any():
            values = np.array([float(row[key]) if row.get(key) is not None else 0.0 for row in rows])
            weights = np.array([float(row.get("weight", 1.0)) if key == "loss" else 1.0 for row in rows]) * known
            found[title] = values, weights
    return found


def _draws(count: int) -> NDArray[np.int64]:
    """How often each example is drawn in each resample, [RESAMPLES, n]; the same for every result with as many examples."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)


def _means(values: Values, weights: Values, draws: NDArray[np.int64]) -> Values:
    with np.errstate(invalid="ignore"):
        means: Values = (draws @ (values * weights)) / (draws @ weights)
    return means


def _interval(value: float, resampled: Values) -> dict[str, float]:
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def _intervals(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    if not rows:
        return {}
    draws = _draws(len(rows))
    return {
        title: _interval(float(np.average(values, weights=weights)), _means(values, weights, draws))
        for title, (values, weights) in _columns(rows).items()
    }


def _differences(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    draws, mine, theirs = _draws(len(one)), _columns(other), _columns(one)
    found = {}
    for title in mine.keys() & theirs.keys():
        (values, weights), (before, _) = mine[title], theirs[title]
        gap = values - before
        found[title] = _interval(float(np.average(gap, weights=weights)), _means(gap, weights, draws))
    return dict(sorted(found.items()))


def _side_by_side(kept: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for row in zip(*kept, strict=True):
        if all("output" in item for item in row):
            rows.append({
                "prompt": row[0].get("prompt", ""), "expected": row[0].get("expected", ""), "outputs": [item["output"] for item in row],
                "right": [item.get("right") for item in row],
            })  # fmt: skip
    rows.sort(key=lambda row: (len(set(row["outputs"])) == 1, all(row["right"])))
    return rows[:MOST_ROWS]
