"""One job folder, whatever its operation: check, run or resume, and leave `result.json` whatever happens."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.core.control import DISK_REFUSED, Control, write_json
from engine.core.errors import EngineError, Fault, Reason, RecipeError
from engine.core.events import EventLog
from engine.core.fork import begin_log
from engine.core.recipe import parse_recipe
from engine.ops.check import Checked, require
from engine.train.run import Ending

RESULT = "result.json"
FULL = {errno.ENOSPC, errno.EDQUOT}


def driver(operation: str) -> Callable[..., Ending]:
    """The driver of an operation: `run(checked, folder, log, control)` of the module that carries its name."""
    run: Callable[..., Ending] = importlib.import_module(f"engine.ops.{operation}").run
    return run


def run_folder(folder: Path) -> dict[str, Any]:
    """Run or resume the job in `folder`; returns what was written to result.json. Never raises for what a run can meet.

    On a disk so full that not even this can be written there is no result.json, and `exit_code` tells of it.
    """
    folder = folder.resolve()
    with _alone(folder):
        (folder / RESULT).unlink(missing_ok=True)
        control = Control(folder)
        control.listen_for_sigterm()
        log: EventLog | None = None
        try:
            begin_log(folder)
            log = EventLog(folder)
            ending = _run(folder, log, control)
            done = "succeeded" if ending.exports else ending.reason
            result: dict[str, Any] = {"outcome": done, "reason": ending.reason, "message": ending.message, "faults": []}
        except Exception as error:
            result = _failure(error, folder)
        return _written(folder, log, result)


def exit_code(folder: Path, result: dict[str, Any]) -> int:
    """What the process of a run ends with: 0, 1 after a failure, DISK_REFUSED when the disk did not even take the result."""
    if not (folder / RESULT).exists():
        return DISK_REFUSED
    return 1 if result["outcome"] == "failed" else 0


def _written(folder: Path, log: EventLog | None, result: dict[str, Any]) -> dict[str, Any]:
    """Leave the result. What the disk refuses now turns a success into a failure that can go on, and hides no earlier failure."""
    try:
        if log is not None:
            try:
                log.emit("state", {"state": "done", "message": result["message"]})
            finally:
                log.close()
    except OSError as error:
        result = result if result["outcome"] == "failed" else _failure(error, folder)
    try:
        write_json(folder / RESULT, result)
    except OSError as error:
        result = result if result["outcome"] == "failed" else _failure(error, folder)
    return result


def _run(folder: Path, log: EventLog, control: Control) -> Ending:
    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    log.emit("state", {"state": "starting", "message": "Reading the model and the data."})
    checked: Checked = require(recipe)
    return driver(recipe.operation)(checked, folder, log, control)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one child per job, ever."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is already running this job; this one leaves it alone.", file=sys.stderr)
            raise SystemExit(3) from None
        yield


def _failure(error: Exception, folder: Path) -> dict[str, Any]:
    faults: tuple[Fault, ...]
    reason: Reason
    if isinstance(error, RecipeError):
        faults, reason = error.faults, "bad_input"
    elif isinstance(error, EngineError):
        faults, reason = (error.fault,), error.reason
    elif _is_out_of_memory(error):
        faults, reason = (_memory_fault(folder),), "out_of_memory"
    elif isinstance(error, OSError):
        faults, reason = (
            (
                Fault(
                    where="machine",
                    what=f"The machine refused a file operation: {error.strerror or error}.",
                    why="The disk is full."
                    if error.errno in FULL
                    else "A full disk or a missing permission is the usual cause.",
                    way_out="Free space or mend the permission, then resume: the last checkpoint is kept.",
                    code="os_error",
                ),
            ),
            "environment",
        )
    else:
        faults, reason = (
            (
                Fault(
                    where="engine",
                    what="The run ended through a fault of the studio, not of yours.",
                    why=f"{type(error).__name__}: {str(error)[:300]}",
                    way_out="Press 'again'; if it happens twice, report it with the log of this run.",
                    code="bug",
                ),
            ),
            "bug",
        )
    traceback.print_exception(error, file=sys.stderr)
    return {
        "outcome": "failed",
        "reason": reason,
        "message": str(faults[0]),
        "faults": [fault.to_dict() for fault in faults],
    }


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text or "not enough memory" in text)
    )


def _memory_fault(folder: Path) -> Fault:
    try:
        settings = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["settings"]
        batch, accumulate = int(settings["batch_size"]), int(settings["accumulate"])
    except (OSError, ValueError, KeyError, TypeError):
        batch, accumulate = 2, 1
    if batch > 1:
        way_out = f"Choose {batch // 2} examples at a time and add up {accumulate * 2} batches: the same learning in about half the memory."
    else:
        way_out = "Choose a shorter longest text, switch on recomputing activations, or choose a smaller model."
    return Fault(
        where="settings.batch_size",
        what="The machine ran out of memory.",
        why=f"{batch} examples at a time did not fit.",
        way_out=way_out,
        code="out_of_memory",
    )
