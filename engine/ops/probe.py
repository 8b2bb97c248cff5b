"""The *probe* operation: measure a model or data and take a report home."""

from __future__ import annotations

import time
from pathlib import Path

from engine.core.control import Control
from engine.core.events import EventLog
from engine.ops.check import Checked
from engine.ops.work import Interrupted, WorkContext, describe_work, leave, report_json, write_artifact
from engine.train.run import Ending


def run(checked: Checked, folder: Path, log: EventLog, control: Control, *, nested: bool = False) -> Ending:
    """Measure, and write the report as a sealed artifact."""
    facts, lead, began = checked.facts, checked.composition.chosen[0], time.monotonic()
    assert facts is not None
    ctx = WorkContext(checked.recipe, facts, lead, folder, log, control)
    log.emit("state", {"state": "running", "message": f"{lead.method.card.title} is measuring."})
    try:
        report = lead.method(lead.params).measure(ctx.inputs, ctx)
    except Interrupted as error:
        return leave(error)
    ending = Ending(reason="completed", message=report.sentence)
    description = describe_work(
        checked, lead, kind="report", ending=ending, forms={}, seconds=time.monotonic() - began,
        report=report_json(report), notes=[*report.notes, *ctx.notes],
    )  # fmt: skip
    write_artifact(folder, checked.recipe, description, log, lambda beside: None, certify=not nested)
    return ending
