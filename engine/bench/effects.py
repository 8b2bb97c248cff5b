"""The table of effects: what each method's card promises, and what was measured here. Written by `make effects`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from engine.bench.measure import commit, machine

COLUMNS = ("slug", "behaviour", "baseline", "ours", "theirs", "verdict", "paper", "note")
HEADINGS = ("behaviour", "with the method", "baseline", "its figure", "verdict", "paper", "note")
Row = dict[str, str]


def merge_rows(lines: Path, rows: Iterable[Row]) -> Path:
    """Put newly measured rows into the JSON lines (a study's old rows are replaced) and rewrite the page beside them."""
    known: list[Row] = []
    if lines.exists():
        known = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line]
    fresh = [{**row, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "machine": machine()} for row in rows]
    measured = {row["study"] for row in fresh}
    merged = sorted(
        [*(row for row in known if row["study"] not in measured), *fresh], key=lambda row: (row["slug"], row["study"])
    )
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in merged), encoding="utf-8")
    page = lines.with_suffix(".md")
    page.write_text(_page(merged), encoding="utf-8")
    return page


def _page(rows: list[Row]) -> str:
    held = sum(row["verdict"] == "holds" for row in rows)
    text = [
        "# Effects",
        "",
        "Command: `make effects` (all of them; long), or `make effects ARGS='-k sara'`. Each row is written by the study named in "
        "`effects.jsonl`, with its commit, date and machine. Seeds stand beside the numbers.",
        "",
        f"{held} of {len(rows)} promised effects hold at this size. The others stay in the table, with what was tried.",
        "",
        "Read them as small studies: few seeds, small models. Rates were picked from a few values, partly on seeds that are reported too (increlora, the pruning "
        "and repair rows, said), and some set-ups were changed after a first form had shown nothing (guide-grpo, increlora, stn, lst, pcb-merging). Only a set-up "
        "fixed beforehand would prove an effect.",
        "",
    ]
    for slug in dict.fromkeys(row["slug"] for row in rows):
        mine = [row for row in rows if row["slug"] == slug]
        text += [f"## {slug}", "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
        for row in mine:
            cells = (
                row["behaviour"],
                row["ours"],
                row["baseline"],
                row["theirs"],
                row["verdict"],
                row["paper"],
                row["note"],
            )
            text.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        stamps = sorted({f"commit {row['commit']}, {row['date']}, {row['machine']}" for row in mine})
        text += ["", *(f"Measured at {stamp}." for stamp in stamps), ""]
    return "\n".join(text)
