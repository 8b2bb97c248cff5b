"""The benchmark command: runs studies by name and rewrites their section of docs/benchmarks."""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bench.measure import ROOT, commit, load_average, machine

DOCS = ROOT / "docs" / "benchmarks"


@dataclass(kw_only=True)
class Section:
    """One table: rows of strings, sentences around it, and one JSON line per goal."""

    title: str
    intro: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A benchmark: a module in engine.bench with a STUDY of this type."""

    name: str
    page: str  # file in docs/benchmarks
    minutes: float
    quick: bool  # part of `make bench`
    seed: int
    run: Callable[[], list[Section]]


def studies() -> dict[str, Study]:
    """Every study found in engine/bench."""
    import engine.bench

    found = {}
    for info in pkgutil.iter_modules(engine.bench.__path__):
        study = getattr(importlib.import_module(f"engine.bench.{info.name}"), "STUDY", None)
        if isinstance(study, Study):
            found[study.name] = study
    return found


ALL = studies


def run_named(names: list[str]) -> int:
    """Run the named studies, or the quick ones, and rewrite their pages; returns an exit code."""
    known = studies()
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"There is no benchmark called {unknown[0]}. Choose from: {', '.join(known)}.")
        return 2
    for study in [known[name] for name in names] or [study for study in known.values() if study.quick]:
        start = time.perf_counter()
        print(f"{study.name}: about {study.minutes:g} minutes …", flush=True)
        sections = study.run()
        write_page(study, sections, time.perf_counter() - start)
        print(f"{study.name}: wrote docs/benchmarks/{study.page}", flush=True)
    return 0


def write_page(study: Study, sections: list[Section], seconds: float) -> Path:
    """Rewrite the page of a study and its JSON lines."""
    DOCS.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    lines = [
        f"# {study.name.replace('-', ' ').capitalize()}",
        "",
        f"Command: `python -m engine bench {study.name}` · commit {commit()} · {date} · seed {study.seed} · {seconds / 60:.1f} minutes.",
        "",
        f"Machine: {machine()}; load average at the end {load_average()}.",
        "",
    ]
    goals = []
    for section in sections:
        lines += [
            f"## {section.title}",
            "",
            section.intro,
            "",
            "| " + " | ".join(section.columns) + " |",
            "|" + "---|" * len(section.columns),
        ]
        lines += ["| " + " | ".join(row) + " |" for row in section.rows]
        lines += ["", *(f"- {remark}" for remark in section.remarks), ""]
        goals += [{**goal, "machine": machine(), "commit": commit(), "date": date} for goal in section.goals]
    path = DOCS / study.page
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    if goals:
        (DOCS / f"{study.name}.jsonl").write_text("".join(json.dumps(goal) + "\n" for goal in goals), encoding="utf-8")
    return path
