"""The *train* operation: build, train or resume, export."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch

from engine.core.control import Control
from engine.core.errors import RecipeError, bad_input
from engine.core.events import EventLog
from engine.core.fork import Fork, differing, fork_faults, fork_of
from engine.core.recipe import Recipe
from engine.core.space import Knob, is_live
from engine.ops.check import Checked
from engine.tasks import task as task_named
from engine.tasks.base import Encoded, Task
from engine.tasks.cache import encoded_data
from engine.train import checkpoint
from engine.train.checkpoint import Snapshot
from engine.train.clock import Clock
from engine.train.export import build_slots, export
from engine.train.frozen import bottom_of
from engine.train.loop import train
from engine.train.parts import DataPolicy, seeded
from engine.train.run import Ending, Run, attach_parts, restore_structure, seed_everything
from engine.train.trainables import collect, halve_frozen


def run(checked: Checked, folder: Path, log: EventLog, control: Control, *, nested: bool = False) -> Ending:
    """The *train* operation: prepare or resume, train, export. A nested run is a piece of a flow and is not certified by itself."""
    ready = prepare(checked, folder, log, control)
    announce(ready)
    ending = train(ready)
    if ending.exports:
        log.emit(
            "state",
            {"state": "exporting", "message": "Writing the result and checking it in a clean process."},
            step=ready.clock.step,
        )
        export(ready, ending, certify=not nested)
    return ending


def announce(run: Run) -> None:
    """Say with what, and from where, a run begins."""
    machine, count = run.facts.machine, run.trainables.num_elements()
    run.log.emit(
        "child",
        {
            "attempt": attempt_of(run.folder),
            "pid": os.getpid(),
            "device": machine.device,
            "device_name": machine.device_name,
            "num_threads": torch.get_num_threads(),
            "num_trainable": count,
            "total_steps": run.clock.total_steps,
            "torch": torch.__version__,
        },
    )
    origin = fork_of(run.folder)
    if origin is not None and run.clock.step == origin.step:
        run.log.emit("log", {"level": "info", "message": _comes_from(origin, run.recipe)}, step=origin.step)
    verb = f"Going on from step {run.clock.step:,}" if run.clock.step else "Learning"
    run.log.emit("state", {"state": "running", "message": f"{verb} with {count:,} numbers that may change."})


def _comes_from(origin: Fork, recipe: Recipe) -> str:
    differs = [
        f"{name.removeprefix('settings.')} is {after} instead of {before}"
        for name, (before, after) in differing(origin.recipe, recipe).items()
    ]
    return f"Goes on from step {origin.step:,} of “{origin.name}”" + (
        f": {', '.join(differs)}." if differs else ", unchanged."
    )


def prepare(checked: Checked, folder: Path, log: EventLog, control: Control, *, forked: bool = False) -> Run:
    """Load model and data, attach every part, restore the newest intact checkpoint.

    forked: the checkpoint may come from a run with other settings, of which this one takes over the state and not the settings.
    """
    recipe, facts = checked.recipe, checked.facts
    assert facts is not None
    settings = recipe.settings
    device = torch.device(facts.machine.device)
    task = task_named(recipe.task)
    tokenizer = task.load_tokenizer(facts.model)
    encoded = encoded_data(
        task, tokenizer, recipe, facts, lambda note: log.emit("log", {"level": "info", "message": note})
    )
    for note in encoded.notes:
        log.emit("log", {"level": "warning", "message": note})
    seed_everything(settings.seed)
    model = task.load_model(facts.model, facts.data, dtype=torch.float32, seed=settings.seed).to(device)

    composition, slots = build_slots(recipe, facts, task)
    attach_parts(slots, task, model, encoded, tokenizer, recipe)
    snapshot, complaints = checkpoint.newest(folder)
    for complaint in complaints:
        log.emit("log", {"level": "warning", "message": complaint})
    fresh_plan = snapshot is not None and snapshot.values["fingerprint"] != recipe.fingerprint()
    if snapshot is not None:
        if fresh_plan and not forked:
            _refuse_other_recipe(folder, snapshot, recipe)
        restore_structure(slots, snapshot)
    trainables = collect(model, slots.parametrizations, task.fresh(model))
    if snapshot is not None:
        trainables.arrange(snapshot.values["names"])
    if settings.precision == "bf16":
        halve_frozen(model)
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
        run.restore(snapshot, fresh_plan=fresh_plan)
    if settings.gradient_checkpointing == "on":
        recompute(run, offload=settings.activation_offload == "on")
    return run


def recompute(run: Run, *, offload: bool) -> None:
    """Let every block forget what it computed and compute it again on the way back; offload: what it was asked waits in main memory.

    The library also makes the embeddings' output require a gradient, which only its older way of recomputing needs: autograd would then follow every
    block below the lowest thing that learns. Those blocks remember nothing as they are; recomputed, they would keep what they were asked.
    """
    model: Any = run.model
    if not model.supports_gradient_checkpointing:
        raise bad_input(
            "settings.gradient_checkpointing",
            "This model cannot recompute its activations.",
            f"The library has no such form of {type(model).__name__}.",
            "Switch 'Recompute instead of remember' off, and choose fewer examples at a time where memory is short.",
            "cannot_recompute",
        )
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
    model.disable_input_require_grads()
    bottom = bottom_of(model, run.encoded.train[0].token_rows()[0], run.autocast)
    for block in list(bottom.stack)[: bottom.blocks] if bottom is not None else ():
        setattr(block, "gradient_checkpointing", False)  # noqa: B010


def _refuse_other_recipe(folder: Path, snapshot: Snapshot, recipe: Recipe) -> None:
    """A checkpoint of another recipe may only be that of the run from which this one was forked, with changes that a run survives."""
    origin = fork_of(folder)
    if origin is None or snapshot.values["fingerprint"] != origin.recipe.fingerprint():
        raise bad_input(
            "recipe",
            "This folder holds checkpoints of another recipe.",
            "A run cannot go on with other settings.",
            "Start it as a new run.",
            "other_recipe",
        )
    faults = fork_faults(origin.recipe, recipe, lambda name: is_live(Knob(name=name), recipe))
    if faults:
        raise RecipeError(faults)


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


def attempt_of(folder: Path) -> int:
    """Which attempt at this job this is, counted from 1."""
    try:
        return int(json.loads((folder / "attempt.json").read_text(encoding="utf-8"))["attempt"])
    except (FileNotFoundError, ValueError, KeyError):
        return 1
