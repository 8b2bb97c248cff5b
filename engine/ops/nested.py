"""Runs inside of a job: their log is told to the outer log on one continuous axis, and one of their results is taken home."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.artifact import seal
from engine.core.control import write_json
from engine.core.events import LOG_NAME, EventLog, Kind, read_events
from engine.core.method import Chosen
from engine.core.work import Report, StepResult
from engine.ops.check import Checked
from engine.ops.work import certify_artifact, describe_work, report_json, write_artifact
from engine.train.export import ARTIFACT
from engine.train.run import Ending

_SHIFTED = ("step", "samples", "tokens")
_TOLD: frozenset[str] = frozenset({"evaluation", "signal", "sample", "log"})


class NestedLog(EventLog):
    """The log of a piece. What a watcher of the whole job wants to see goes to the outer log too, its steps moved behind those before.

    remedy: what a way out that was proposed inside of the piece means for the whole job, or None; without it, no way out is passed on, for it changes the recipe
    of the piece.
    """

    def __init__(
        self,
        folder: Path,
        outer: EventLog,
        name: str,
        offset: dict[str, int],
        total: int,
        *,
        remedy: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda remedy: None,
    ) -> None:
        super().__init__(folder, interval=outer.interval)
        self.outer, self.name, self.offset, self.total, self.remedy = outer, name, offset, total, remedy

    def emit(self, kind: Kind, data: dict[str, Any], *, step: int = 0, key: str = "") -> None:
        super().emit(kind, data, step=step, key=key)
        behind = step + self.offset["step"]
        if kind in _TOLD:
            shown = {**data, "samples": data["samples"] + self.offset["samples"]} if "samples" in data else data
            if shown.get("remedy"):
                meant = self.remedy(shown["remedy"])
                shown = {name: value for name, value in shown.items() if name != "remedy"} | (
                    {"remedy": meant} if meant else {}
                )
            self.outer.emit(kind, shown, step=behind, key=f"{self.name}/{key}")
        elif kind == "progress":
            total = max(self.total, behind)
            self.outer.emit(
                "progress",
                {"done_steps": behind, "total_steps": total, "fraction": round(behind / max(1, total), 4), "eta_seconds": None},
                step=behind,
            )  # fmt: skip

    def metric(self, row: dict[str, Any]) -> None:
        super().metric(row)
        moved = {key: row[key] + self.offset[key] for key in _SHIFTED if key in row}
        self.outer.metric({**row, **moved, "piece": self.name})

    def flush(self) -> None:
        super().flush()
        self.outer.flush()


def last_row(folder: Path) -> dict[str, Any]:
    """The row of the last step in a folder's log."""
    found: dict[str, Any] = {}
    if (folder / LOG_NAME).exists():
        for event, _ in read_events(folder / LOG_NAME):
            if event.kind == "metric":
                found = event.data["rows"][-1]
    return found


def take_home(
    checked: Checked,
    lead: Chosen,
    folder: Path,
    log: EventLog,
    *,
    taken: StepResult | None,
    report: Report | None,
    message: str,
    notes: list[str],
    began: float,
) -> Ending:
    """Make the job's artifact: that of a piece with the report of the whole, or the report alone."""
    ending, seconds = Ending(reason="completed", message=message), time.monotonic() - began
    body = report_json(report) if report is not None else None
    extra: dict[str, Any] = {"report": body} if body else {}
    if taken is None:
        said = [*(report.notes if report else ()), *notes]
        description = describe_work(
            checked, lead, kind="report", ending=ending, forms={}, seconds=seconds, notes=said, **extra
        )
        write_artifact(folder, checked.recipe, description, log, lambda beside: None)
        return ending
    target, beside = folder / ARTIFACT, folder / f".{ARTIFACT}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(taken.artifact, beside)
    (beside / "certificate.json").unlink(missing_ok=True)
    whole = describe_work(checked, lead, kind="", ending=ending, forms={}, seconds=seconds)
    methods = [item for item in whole["methods"] if item["slug"] == lead.slug]
    inside = taken.description
    description = {
        **inside,
        "operation": checked.recipe.operation,
        "name": checked.recipe.name or inside["name"],
        "methods": [*methods, *inside["methods"]],
        "fingerprint": checked.recipe.fingerprint(),
        "parents": whole["parents"],
        "ending": whole["ending"],
        "seconds": whole["seconds"],
        "notes": [*inside["notes"], *(report.notes if report else ()), *notes],
        **extra,
    }
    write_json(beside / "artifact.json", description)
    # recipe.yaml stays that of the piece: an adapter is attached again by it.
    (beside / f"{checked.recipe.operation}.yaml").write_text(checked.recipe.to_yaml(), encoding="utf-8")
    seal(beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    certify_artifact(target, log)
    return ending


def result_of(name: str, folder: Path, ending: Ending) -> StepResult:
    """A finished piece, read from its folder."""
    description = json.loads((folder / ARTIFACT / "artifact.json").read_text(encoding="utf-8"))
    return StepResult(name=name, folder=folder, outcome="succeeded", message=ending.message, description=description)
