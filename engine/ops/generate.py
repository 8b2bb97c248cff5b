"""The *generate* operation: make rows item by item. A finished item is written down, so that an interrupted job goes on at the next one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from engine.core.control import Control
from engine.core.errors import bad_input
from engine.core.events import EventLog
from engine.ops.check import Checked
from engine.ops.work import Interrupted, WorkContext, describe_work, leave, write_artifact
from engine.train.run import Ending

RECORD = "rows.partial.jsonl"


def run(checked: Checked, folder: Path, log: EventLog, control: Control, *, nested: bool = False) -> Ending:
    """Generate, and write the rows as a sealed data set."""
    facts, lead, began = checked.facts, checked.composition.chosen[0], time.monotonic()
    assert facts is not None
    ctx = WorkContext(checked.recipe, facts, lead, folder, log, control)
    log.emit("state", {"state": "running", "message": f"{lead.method.card.title} is making examples."})
    method = lead.method(lead.params)
    try:
        rows = _rows(method, ctx, folder / RECORD, log)
    except Interrupted as error:
        return leave(error)
    if not rows:
        raise bad_input(
            "data",
            f"{lead.method.card.title} found nothing to make an example of.",
            " ".join(ctx.notes) or "No item gave a row.",
            "Give it more or other data, or a model that does better.",
            "no_examples",
        )
    ending = Ending(reason="completed", message=f"Made {len(rows):,} example{'s' if len(rows) != 1 else ''}.")
    description = describe_work(
        checked, lead, kind="dataset", ending=ending, forms={"data": "jsonl"}, seconds=time.monotonic() - began,
        report={**ctx.report, "numbers": {"rows": len(rows)}}, notes=ctx.notes,
        samples=[{"prompt": "", "output": json.dumps(row, ensure_ascii=False), "expected": ""} for row in rows[:6]],
    )  # fmt: skip

    def fill(beside: Path) -> None:
        (beside / "data").mkdir()
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        (beside / "data" / "rows.jsonl").write_text(text, encoding="utf-8")

    write_artifact(folder, checked.recipe, description, log, fill, certify=not nested)
    (folder / RECORD).unlink()
    return ending


def _rows(method: Any, ctx: WorkContext, record: Path, log: EventLog) -> list[dict[str, Any]]:
    """Every row, those of earlier attempts from the record: one line an item, {"rows": […], "report": {…}}."""
    lines = _finished(record)
    rows = [row for line in lines for row in line["rows"]]
    if lines:
        ctx.report.update(lines[-1]["report"])
    items = method.items(ctx.inputs, ctx)
    with record.open("a", encoding="utf-8") as file:
        for place in range(len(lines), len(items)):
            ctx.progress(place, len(items))
            ctx.place = str(place)
            made = list(method.rows(items[place], ctx.inputs, ctx))
            file.write(json.dumps({"rows": made, "report": ctx.report}, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            rows += made
        ctx.progress(len(items), len(items))
    return rows


def _finished(record: Path) -> list[dict[str, Any]]:
    """Whole lines of the record; one that a crash tore is cut off."""
    if not record.exists():
        return []
    raw = record.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        record.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
