"""The table of effects: every study records its rows here, and `make effects` rewrites docs/benchmarks/effects.md from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.bench.effects import COLUMNS, Row, merge_rows


@pytest.fixture(scope="session")
def _rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    target = request.config.getoption("--effects-table")
    if target and rows:
        merge_rows(Path(target), rows)


@pytest.fixture
def effect_row(_rows: list[Row], request: pytest.FixtureRequest) -> Callable[..., None]:
    """Record one measured effect.

    slug, behaviour (one sentence: what was compared), baseline, ours, theirs (numbers with their spread and seeds, as text), verdict
    ("holds" | "not seen at this size" | "opposite"), paper (its figure, or empty), note (what was tried, or empty).
    """

    def record(**values: Any) -> None:
        row: Row = {
            "study": request.node.nodeid.rpartition("/")[2],
            **{name: str(values.pop(name, "")) for name in COLUMNS},
        }
        assert not values, f"An effect has no column {sorted(values)}."
        assert row["verdict"] in {"holds", "not seen at this size", "opposite"}, row["verdict"]
        _rows.append(row)
        print(json.dumps(row, ensure_ascii=False))

    return record
