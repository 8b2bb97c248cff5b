"""Drills: faults made on purpose. They run small in every `make test`; `make drills` runs them at length and writes docs/benchmarks/drills.md.

`python -m tests.drills` makes the page of the rows that the drills left in the file that BONSAI_DRILL_ROWS names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.bench.measure import commit, load_average, machine
from engine.bench.pages import DOCS

ROWS = "BONSAI_DRILL_ROWS"


@dataclass
class Told:
    """What a drill has done so far."""

    name: str
    what: str
    unit: str
    place: str  # the test
    setting: str  # the variable that says how often, with its value
    times: int = 0
    violations: int = 0
    note: str = ""
    seconds: float = 0.0


def often(name: str, usual: int) -> int:
    """How often a drill strikes: few times in the suite, as often as the environment says in `make drills`. 0 means everywhere."""
    return int(os.environ.get(name, usual))


@contextmanager
def drill(name: str, what: str, *, unit: str, place: str, setting: str = "") -> Iterator[Told]:
    """Count what happens inside; whatever is raised is a violation too. The row is left when it is over."""
    told = Told(name, what, unit, place, f"{setting}={os.environ[setting]}" if setting in os.environ else "")
    began = time.monotonic()
    try:
        yield told
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        told.violations += 1
        told.note = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        raise
    finally:
        told.seconds = time.monotonic() - began
        if ROWS in os.environ:
            with Path(os.environ[ROWS]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(told), ensure_ascii=False) + "\n")


def write_page(rows: Path, page: Path = DOCS / "drills.md") -> int:
    """The table of all drills; returns the number of violations."""
    told = [Told(**json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
    violations = sum(one.violations for one in told)
    lines = [
        "# Drills",
        "",
        "Faults made on purpose, while real runs learn. The mark is no violation at all: nothing lost, nothing twice, old state or new state and never a mixture, "
        "the same bits after an interruption. The same tests run with small numbers in `make test`.",
        "",
        f"Command: `make drills` · commit {commit()} · {time.strftime('%Y-%m-%d')}.",
        "",
        f"Machine: {machine()}; load average at the end {load_average()}.",
        "",
        "| drill | what is done | how often | violations | seconds | command |",
        "|---|---|---|---|---|---|",
    ]
    for one in told:
        command = f"{one.setting} pytest {one.place}".strip()
        note = f" ({one.note})" if one.note else ""
        lines.append(
            f"| {one.name} | {one.what} | {one.times:,} {one.unit} | {one.violations}{note} | {one.seconds:,.0f} | `{command}` |"
        )
    page.write_text("\n".join(lines).replace("\n\n\n", "\n\n") + "\n", encoding="utf-8")
    return violations


if __name__ == "__main__":
    sys.exit(1 if write_page(Path(os.environ[ROWS])) else 0)
