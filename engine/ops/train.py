"""The *train* operation for one job folder: check, build, train or resume, export, and leave `result.json` whatever happens."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch

from engine.core.control import Control, write_json
from engine.core.errors import EngineError, Fault, Reason, RecipeError
from engine.core.events import EventLog
from engine.core.recipe import Recipe, parse_recipe
from engine.ops.check import Checked, require
from engine.tasks import task as task_named
from engine.tasks.base import Encoded, Task
from engine.train import checkpoint
from engine.train.clock import Clock
from engine.train.export import build_slots, export
from engine.train.loop import train
from engine.train.parts import DataPolicy, seeded
from engine.train.run import Ending, Run, seed_everything
from engine.train.trainables import collect, halve_frozen

RESULT = "result.json"


def run_folder(folder: Path) -> dict[str, Any]:
    """Run or resume the job in `folder`; returns what was written to result.json. Never raises for what a run can meet."""
    folder = folder.resolve()
    with _alone(folder):
        (folder / RESULT).unlink(missing_ok=True)
        log = EventLog(folder)
        control = Control(folder)
        control.listen_for_sigterm()
        try:
            ending = _run(folder, log, control)
            done = "succeeded" if ending.exports else ending.reason
            result: dict[str, Any] = {"outcome": done, "reason": ending.reason, "message": ending.message, "faults": []}
        except Exception as error:
            result = _failure(error, folder)
        log.emit("state", {"state": "done", "message": result["message"]})
        log.close()
        write_json(folder / RESULT, result)
        return result


def _run(folder: Path, log: EventLog, control: Control) -> Ending:
    attempt = _attempt(folder)
    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    log.emit("state", {"state": "starting", "message": "Reading the model and the data."})
    checked = require(recipe)
    run = prepare(checked, folder, log, control)
    log.emit(
        "child",
        {
            "attempt": attempt,
            "pid": os.getpid(),
            "device": run.facts.machine.device,
            "device_name": run.facts.machine.device_name,
            "num_threads": torch.get_num_threads(),
            "num_trainable": run.trainables.num_elements(),
            "total_steps": run.clock.total_steps,
            "torch": torch.__version__,
        },
    )
    verb = f"Going on from step {run.clock.step:,}" if run.clock.step else "Learning"
    log.emit(
        "state",
        {"state": "running", "message": f"{verb} with {run.trainables.num_elements():,} numbers that may change."},
    )
    ending = train(run)
    if ending.exports:
        log.emit(
            "state",
            {"state": "exporting", "message": "Writing the result and checking it in a clean process."},
            step=run.clock.step,
        )
        export(run, ending)
    return ending


def prepare(checked: Checked, folder: Path, log: EventLog, control: Control) -> Run:
    """Load model and data, attach every part, restore the newest intact checkpoint."""
    recipe, facts = checked.recipe, checked.facts
    assert facts is not None
    settings = recipe.settings
    device = torch.device(facts.machine.device)
    task = task_named(recipe.task)
    tokenizer = task.load_tokenizer(facts.model)
    encoded = task.encode(list(task.rows(facts.data)), tokenizer, recipe, facts.data)
    for note in encoded.notes:
        log.emit("log", {"level": "warning", "message": note})
    seed_everything(settings.seed)
    model = task.load_model(facts.model, facts.data, dtype=torch.float32, seed=settings.seed).to(device)

    composition, slots = build_slots(recipe, facts, task)
    order = list(range(min(len(encoded.train), 8 * (settings.batch_size or 1))))
    few = [
        task.collate([encoded.train[i] for i in indices], tokenizer, recipe)
        for indices in task.batches(encoded.train, order, settings.batch_size or 1, recipe)
    ]
    for policy in slots.policies:
        policy.survey(encoded)
    for part in slots.parametrizations:
        part.calibrate(model, few)
    for part in slots.parametrizations:
        part.attach(model)
    snapshot, complaints = checkpoint.newest(folder)
    for complaint in complaints:
        log.emit("log", {"level": "warning", "message": complaint})
    if snapshot is not None:
        for name, part in slots.names.items():
            if part in slots.parametrizations:
                part.load_state_dict(
                    checkpoint.join_state(f"part/{name}", snapshot.tensors, snapshot.values["parts"][name])
                )
    trainables = collect(model, slots.parametrizations, task.fresh(model))
    if settings.precision == "bf16":
        halve_frozen(model)
    if settings.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    for part in slots.parametrizations:
        part.sync(model)
    optimizer = slots.optimizer.build(trainables, settings.learning_rate or 0.0)
    clock = plan(recipe, task, encoded, settings.seed, slots.policies)
    run = Run(
        recipe=recipe,
        facts=facts,
        composition=composition,
        task=task,
        model=model,
        tokenizer=tokenizer,
        encoded=encoded,
        slots=slots,
        trainables=trainables,
        optimizer=optimizer,
        clock=clock,
        folder=folder,
        log=log,
        control=control,
    )
    if snapshot is not None:
        if snapshot.values["fingerprint"] != recipe.fingerprint():
            raise EngineError(
                Fault(
                    where="recipe",
                    what="This folder holds checkpoints of another recipe.",
                    why="A run cannot go on with other settings.",
                    way_out="Start it as a new run.",
                    code="other_recipe",
                ),
                "bad_input",
            )
        run.restore(snapshot)
    return run


def plan(recipe: Recipe, task: Task, encoded: Encoded, seed: int, policies: Sequence[DataPolicy] = ()) -> Clock:
    """How many steps the recipe means, for the examples that the data policies let through."""
    settings = recipe.settings
    order: Sequence[int] = torch.randperm(len(encoded.train), generator=seeded(seed, "order", "0")).tolist()
    for policy in policies:
        order = policy.rows(order, 0)
    batches = task.batches(encoded.train, order, settings.batch_size or 1, recipe)
    per_epoch = max(1, ceil(len(batches) / settings.accumulate))
    total = max(1, ceil((settings.epochs or 1.0) * per_epoch - 1e-9))
    return Clock(total_steps=min(total, settings.max_steps or total), steps_per_epoch=per_epoch, num_samples=len(order))


def _attempt(folder: Path) -> int:
    try:
        return int(json.loads((folder / "attempt.json").read_text(encoding="utf-8"))["attempt"])
    except (FileNotFoundError, ValueError, KeyError):
        return 1


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
                    why="A full disk or a missing permission is the usual cause.",
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
