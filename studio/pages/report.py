"""The report of a result: the numbers, the table, and a curve drawn by the server. Everything is read from the artifact's description."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from studio.pages import words
from studio.pages.telling import capital
from studio.pages.trials import importances, parallel

MAX_ROWS = 200
WIDTH, HEIGHT, PAD = 640.0, 220.0, 12.0


def report_of(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows of a report: numbers as pairs, the table as rows of cells, the curve as a polyline; None without a report."""
    report = description.get("report") or {}
    table = [row for row in report.get("table") or [] if isinstance(row, Mapping)]
    numbers = [
        (_title(name), _cell(value)) for name, value in (report.get("numbers") or {}).items() if _is_plain(value)
    ]
    if not table and not numbers:
        return None
    columns = list(dict.fromkeys(str(key) for row in table for key in row))
    return {
        "title": report.get("title") or "What was found",
        "sentence": report.get("sentence", ""),
        "numbers": numbers,
        "columns": [_title(name) for name in columns],
        "rows": [[(_title(name), _cell(row.get(name))) for name in columns] for row in table[:MAX_ROWS]],
        "more": max(0, len(table) - MAX_ROWS),
        "curve": _curve(
            [row for row in report.get("history") or table if isinstance(row, Mapping)], report.get("curve")
        ),
        "parallel": parallel(table, report.get("knobs"), report.get("score")),
        "importance": importances(report.get("numbers") or {}),
    }


def _curve(table: Sequence[Mapping[str, Any]], axes: Any) -> dict[str, Any] | None:
    """Points of the curve in the coordinates of the picture; a wide range of x is drawn in factors."""
    if not isinstance(axes, Sequence) or len(axes) != 2:
        return None
    x_name, y_name = axes
    points = [
        (float(row[x_name]), float(row[y_name]))
        for row in table
        if _is_number(row.get(x_name)) and _is_number(row.get(y_name))
    ]
    if len({x for x, _ in points}) < 2:
        return None
    wide = min(x for x, _ in points) > 0 and max(x for x, _ in points) / min(x for x, _ in points) >= 30
    places = sorted((math.log10(x) if wide else x, y, x) for x, y in points)
    left, right = places[0][0], places[-1][0]
    low, high = min(y for _, y, _ in places), max(y for _, y, _ in places)
    span = high - low or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = PAD + (WIDTH - 2 * PAD) * (x - left) / (right - left)
        return round(across, 1), round(HEIGHT - PAD - (HEIGHT - 2 * PAD) * (y - low) / span, 1)

    dots = [
        {"x": at(x, y)[0], "y": at(x, y)[1], "says": f"{_title(x_name)} {_cell(value)}: {_cell(y)}"}
        for x, y, value in places
    ]
    one_each = len({x for x, _, _ in places}) == len(places)
    return {
        "x": _title(x_name), "y": _title(y_name), "dots": dots, "width": WIDTH, "height": HEIGHT, "wide": wide,
        "line": " ".join(f"{dot['x']},{dot['y']}" for dot in dots) if one_each else "",
        "from_x": _cell(places[0][2]), "to_x": _cell(places[-1][2]), "low": _cell(low), "high": _cell(high),
    }  # fmt: skip


def _title(name: str) -> str:
    text = str(name).removeprefix("settings.").removeprefix("eval_").replace("_", " ")
    return capital(text)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return f"{value:,}" if isinstance(value, int) else words.number(float(value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
