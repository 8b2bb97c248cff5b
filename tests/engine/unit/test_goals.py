"""The table of goals: the less favourable end of an interval decides, and a miss keeps its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench import pages
from engine.bench.pages import Goal, Section, Study, write_page


@pytest.mark.parametrize(
    ("better", "interval", "met"),
    [("more", (2.9, 3.2), False), ("more", (3.0, 3.2), True), ("less", (2.9, 3.2), False), ("less", (2.8, 3.0), True)],
)
def test_the_end_farther_from_the_aim_decides(better: str, interval: tuple[float, float], met: bool) -> None:
    goal = Goal(goal="speed", value=3.05, interval=interval, target=3.0, better=better, baseline="theirs")  # type: ignore[arg-type]
    assert goal.met is met
    assert ("not met" in goal.verdict) is not met


def test_without_an_aim_nothing_is_claimed() -> None:
    goal = Goal(goal="bytes", value=7.0, baseline="theirs")
    assert goal.met is None and goal.verdict == "no aim"


def test_a_study_leaves_a_page_its_lines_and_a_row_in_the_table_of_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    missed = Goal(
        number="P2", goal="stall", value=0.4, target=0.1, unit="s", baseline="a plain save", reason="The disk was slow."
    )
    held = Goal(number="P1", goal="speed", value=3.1, target=3.0, better="more", baseline="theirs")
    section = Section(
        title="Both", intro="As measured.", columns=("what", "value"), rows=[("stall", "0.4")], goals=[missed, held]
    )
    study = Study(name="both", page="both.md", minutes=0, quick=False, seed=3, run=lambda: [section])
    page = write_page(study, study.run(), 1.0).read_text()
    assert "| stall | 0.4 |" in page and "python manage.py bench both" in page
    lines = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert [line["met"] for line in lines] == [False, True] and all(
        line["commit"] and line["machine"] for line in lines
    )
    table = (tmp_path / "goals.md").read_text()
    assert table.index("| P1 |") < table.index("| P2 |")
    assert "1 of 2 goals are met" in table and "The disk was slow." in table
