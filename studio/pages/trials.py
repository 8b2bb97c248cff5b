"""Trials of a search: the live table of a run, the picture of all settings beside each other, and how much each setting mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from studio.pages import words

MOST_ROWS = 60
FEW_VALUES = 6  # so many different values of a setting stand evenly beside each other
WIDTH, HEIGHT, SIDE, TOP, FOOT = 720.0, 300.0, 70.0, 34.0, 14.0
SHADES = 4
STATES = {"waiting": "waits", "running": "learns", "stopped": "stopped", "finished": "finished", "failed": "broke down"}


def setting_title(name: str) -> str:
    """A dotted name as a person reads it: "Learning rate", "Lora r"."""
    text = str(name).removeprefix("settings.").removeprefix("eval_").replace("_", " ").replace(".", " ")
    return f"{text[:1].upper()}{text[1:]}"


def live_trials(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table of a running search from its trials as they stand (jobs.overrides.trials_of); None for a run that is no search."""
    latest = {row["trial"]: row for row in trials}
    if not latest:
        return None
    names = list(dict.fromkeys(str(name) for number in sorted(latest) for name in latest[number].get("values") or {}))
    known = [
        (_gone(row), float(row["score"]), -number) for number, row in latest.items() if is_number(row.get("score"))
    ]
    best = -max(known, default=(0.0, 0.0, 1))[
        2
    ]  # among those that have come furthest: a score at the first look says less
    # what moves first, then the best; a long search shows its upper end
    order = sorted(latest.values(), key=lambda row: (row.get("state") != "running", -_score(row), row["trial"]))
    rows = [
        {
            "trial": row["trial"],
            "values": [(setting_title(name), shown((row.get("values") or {}).get(name))) for name in names],
            "done": row.get("done") or 0,
            "total": row.get("total") or 0,
            "score": shown(row.get("score")),
            "state": str(row.get("state", "")),
            "says": STATES.get(str(row.get("state")), str(row.get("state", ""))),
            "message": str(row.get("message") or ""),
            "best": row["trial"] == best,
            "possible": list(row.get("possible") or ()),
            "asked": _asked(row.get("asked")),
        }
        for row in order
    ]
    return {
        "columns": [setting_title(name) for name in names],
        "rows": rows[:MOST_ROWS],
        "more": max(0, len(rows) - MOST_ROWS),
        "count": len(rows),
        "over": sum(row["state"] in ("finished", "stopped", "failed") for row in rows),
        "any_possible": any(row["possible"] for row in rows),
    }


def _asked(asked: Mapping[str, Any] | None) -> str:
    """What a person has decided and the search has not taken up yet."""
    if not asked:
        return ""
    what = (
        "keep this trial: it goes on after the slice that is under way"
        if asked["verdict"] == "keep"
        else "stop this trial: it ends at its next step"
    )
    return f"{asked['by']} has said to {what}."


def importances(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How much each setting mattered, the most first, as shares."""
    found = numbers.get("importance")
    if not isinstance(found, Mapping):
        return []
    pairs = [(setting_title(name), float(value)) for name, value in found.items() if is_number(value)]
    return [{"title": title, "share": share} for title, share in sorted(pairs, key=lambda pair: -pair[1])]


def parallel(table: Sequence[Mapping[str, Any]], knobs: Any, score: Any) -> dict[str, Any] | None:
    """Parallel coordinates: one axis for each setting and one for the score, one line for each trial, in the coordinates of the picture.

    None when there are no settings, or fewer than two trials with a score. Larger scores are better; lines are shaded by their order.
    """
    if not isinstance(knobs, Sequence) or isinstance(knobs, str) or not isinstance(score, str):
        return None
    names = [str(knob) for knob in knobs]
    rows = [row for row in table if is_number(row.get(score)) and all(is_number(row.get(name)) for name in names)]
    if not names or not score or len(rows) < 2:
        return None
    axes = [_axis([float(row[name]) for row in rows], spread=name != score) for name in (*names, score)]
    step = (WIDTH - 2 * SIDE) / len(names)
    places = [round(SIDE + number * step, 1) for number in range(len(axes))]
    ranked = sorted(rows, key=lambda row: float(row[score]))
    lines = []
    for place, row in enumerate(ranked):  # the best is drawn last, on top
        heights = [axis["at"](float(row[name])) for axis, name in zip(axes, (*names, score), strict=True)]
        said = ", ".join(f"{setting_title(name)} {shown(row[name])}" for name in (*names, score))
        best = place == len(ranked) - 1
        front = f"Trial {row['trial']}: " if is_number(row.get("trial")) else ""
        lines.append(
            {
                "points": " ".join(f"{x},{y}" for x, y in zip(places, heights, strict=True)),
                "shade": "best" if best else f"shade-{SHADES * place // len(ranked)}",
                "says": f"{front}{said}",
            }
        )
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "top": TOP,
        "bottom": HEIGHT - FOOT,
        "lines": lines,
        "axes": [
            {"x": x, "title": setting_title(name), "ticks": axis["ticks"]}
            for x, name, axis in zip(places, (*names, score), axes, strict=True)
        ],
        "best": lines[-1]["says"],
    }


def _axis(values: Sequence[float], *, spread: bool) -> dict[str, Any]:
    """Where a value stands on its axis: few values evenly, a wide range in factors, otherwise in proportion."""
    different = sorted(set(values))
    low, high = different[0], different[-1]

    def height(share: float) -> float:
        return round(HEIGHT - FOOT - (HEIGHT - FOOT - TOP) * share, 1)

    if spread and len(different) <= FEW_VALUES:
        last = max(1, len(different) - 1)
        shares = {value: place / last if len(different) > 1 else 0.5 for place, value in enumerate(different)}
        ticks = [{"y": height(share), "text": shown(value)} for value, share in shares.items()]
        return {"at": lambda value: height(shares[value]), "ticks": ticks}
    wide = low > 0 and high / low >= 30

    def place_of(value: float) -> float:
        if high == low:
            return height(0.5)
        share = math.log(value / low) / math.log(high / low) if wide else (value - low) / (high - low)
        return height(share)

    return {"at": place_of, "ticks": [{"y": place_of(end), "text": shown(end)} for end in dict.fromkeys((low, high))]}


def shown(value: Any) -> str:
    """A value as a cell."""
    if value is None:
        return "–"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else words.number(float(value))
    return str(value)[:60]


def is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gone(row: Mapping[str, Any]) -> float:
    done, total = row.get("done"), row.get("total")
    return min(1.0, float(done) / float(total)) if is_number(done) and is_number(total) and total else 0.0  # type: ignore[arg-type]


def _score(row: Mapping[str, Any]) -> float:
    return float(row["score"]) if is_number(row.get("score")) else -math.inf
