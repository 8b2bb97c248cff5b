"""What a study leaves behind: a readable page, one JSON line a goal, and the table of all goals. Free of torch."""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from engine.bench.measure import ROOT, commit, load_average, machine

DOCS = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure with an aim. `number` is the goal's place in the table of goals ("P1" …); without one the line stays in its study's file.

    `value` is a median and `interval` its 95 % bootstrap interval; the end of the interval that is farther from the aim decides whether it is met.
    `reason` says why it was missed and what was tried.
    """

    number: str = ""
    goal: str
    value: float
    interval: tuple[float, float] | None = None
    target: float | None = None
    better: Literal["more", "less"] = "less"
    unit: str = "ratio"
    baseline: str
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where there is none."""
        if self.target is None:
            return None
        low, high = self.interval or (self.value, self.value)
        return low >= self.target if self.better == "more" else high <= self.target

    @property
    def verdict(self) -> str:
        """The aim and whether it was met, in words: "aim ≥ 3: met"."""
        if self.target is None:
            return "no aim"
        return f"aim {'≥' if self.better == 'more' else '≤'} {self.target:,g}: {'met' if self.met else 'not met'}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(kw_only=True)
class Section:
    """One table: rows of strings, sentences around it, and its goals."""

    title: str
    intro: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A benchmark: a module in engine.bench or jobs.bench with a STUDY of this type."""

    name: str
    page: str  # file in docs/benchmarks
    minutes: float
    quick: bool  # part of `make bench`
    seed: int
    run: Callable[[], list[Section]]
    command: str = "python manage.py bench"


def studies_in(package: ModuleType) -> dict[str, Study]:
    """Every study of a package, by name: its modules that hold a STUDY."""
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    found = [study for module in modules if isinstance(study := getattr(module, "STUDY", None), Study)]
    return {study.name: study for study in found}


def run_studies(known: Mapping[str, Study], names: Sequence[str]) -> None:
    """Run the named studies, one after the other, and write their pages."""
    for study in [known[name] for name in names]:
        start = time.perf_counter()
        print(f"{study.name}: about {study.minutes:g} minutes …", flush=True)
        write_page(study, study.run(), time.perf_counter() - start)
        print(f"{study.name}: wrote docs/benchmarks/{study.page}", flush=True)


def write_page(study: Study, sections: Iterable[Section], seconds: float) -> Path:
    """Rewrite the page of a study, its JSON lines, and the table of all goals."""
    DOCS.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    lines = [
        f"# {study.name.replace('-', ' ').capitalize()}",
        "",
        f"Command: `{study.command} {study.name}` · commit {commit()} · {date} · seed {study.seed} · {seconds / 60:.1f} minutes.",
        "",
        f"Machine: {machine()}; load average at the end {load_average()}.",
        "",
    ]
    stamp = {"machine": machine(), "commit": commit(), "date": date}
    goals: list[dict[str, Any]] = []
    for section in sections:
        lines += [f"## {section.title}", "", section.intro, ""]
        lines += ["| " + " | ".join(section.columns) + " |", "|" + "---|" * len(section.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in section.rows]
        lines += ["", *(f"- {remark}" for remark in section.remarks), ""]
        goals += [{**goal.to_dict(), **stamp} for goal in section.goals]
    path = DOCS / study.page
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    if goals:
        (DOCS / f"{study.name}.jsonl").write_text(
            "".join(json.dumps(goal, ensure_ascii=False) + "\n" for goal in goals), encoding="utf-8"
        )
    write_goals()
    return path


def write_goals() -> Path:
    """Rewrite docs/benchmarks/goals.md from the numbered lines of every study's file."""
    found = []
    for path in sorted(DOCS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("number"):
                found.append((path.stem, row))
    found.sort(key=lambda item: (int(item[1]["number"].lstrip("P")), item[0]))
    met = sum(bool(row["met"]) for _, row in found)
    text = [
        "# Goals",
        "",
        f"Command: `make bench`. {met} of {len(found)} goals are met; those missed stay, with the reason and what was tried. A goal counts as met when the less "
        "favourable end of its 95 % interval passes. Each row stands as one JSON line in the file of its study.",
        "",
        "| goal | what | value | 95 % interval | aim | met | beside | study | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for study, row in found:
        sign = "≥" if row["better"] == "more" else "≤"
        interval = " – ".join(_figure(end) for end in row["interval"]) if row["interval"] else ""
        unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
        aim = "" if row["target"] is None else f"{sign} {_figure(row['target'])}{unit}"
        said = {True: "yes", False: "**no**", None: ""}[row["met"]]
        cells = (
            row["number"],
            row["goal"],
            _figure(row["value"]) + unit,
            interval,
            aim,
            said,
            row["baseline"],
            study,
            row["commit"],
        )
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    missed = [row for _, row in found if row["met"] is False]
    if missed:
        text += ["", "## Missed, and why", ""]
        text += [f"- {row['number']}, {row['goal']}: {row['reason'] or _plain_reason(row)}" for row in missed]
    machines = sorted({row["machine"] for _, row in found})
    text += ["", *(f"Machine: {name}." for name in machines)]
    path = DOCS / "goals.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def _plain_reason(row: dict[str, Any]) -> str:
    """What the figures themselves say of a miss."""
    passes = row["value"] >= row["target"] if row["better"] == "more" else row["value"] <= row["target"]
    return (
        "the median passes, the end of the interval does not: the rounds differ too much."
        if passes
        else "no reason is known yet."
    )


def _figure(value: float) -> str:
    """Three significant digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
