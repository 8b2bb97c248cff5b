"""Forks: a run that goes on from a checkpoint of another one, with a few settings changed. No torch.

A fork's folder holds, before its child starts,
    fork.json       {"step", "name", "recipe"}: where it left the other run, what that one is called, and the recipe that one had
    origin.jsonl    the other run's log, as a link to the same file
    checkpoints/    the checkpoint it starts from, and the best one before it, as links to the same files
so that the other run may be deleted, or go on, without the fork noticing. The child copies the curve up to the fork into a log of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.control import write_json
from engine.core.errors import Fault, bad_input
from engine.core.events import LOG_NAME, Event, read_events
from engine.core.recipe import Recipe

FORK, ORIGIN, CHECKPOINTS = "fork.json", "origin.jsonl", "checkpoints"
PLAN = (
    "epochs",
    "max_steps",
    "max_minutes",
    "evaluations",
    "live_samples",
    "checkpoint_every",
    "keep_checkpoints",
)  # how far to go: free to change at any step
COMPUTING = ("precision", "compile", "gradient_checkpointing", "activation_offload", "frozen_cache")  # how, not what
_CURVES = frozenset({"metric", "evaluation"})


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Where a run comes from."""

    step: int
    name: str  # of the run it left
    recipe: Recipe  # of that run


def fork_of(folder: Path) -> Fork | None:
    """What the folder says about where its run comes from; None for a run that began at the beginning."""
    path = folder / FORK
    if not path.exists():
        return None
    body = json.loads(path.read_text(encoding="utf-8"))
    return Fork(step=int(body["step"]), name=str(body["name"]), recipe=Recipe.model_validate(body["recipe"]))


def differing(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every difference between two recipes by its dotted name, as (before, after); the names of the runs do not count."""
    one, other = _flat(before), _flat(after)
    return {
        name: (one.get(name), other.get(name))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    }


def fork_faults(before: Recipe, after: Recipe, is_live: Callable[[str], bool]) -> list[Fault]:
    """What keeps a run with the recipe `after` from going on where one with `before` stood.

    is_live: whether the setting of that dotted name ("settings.learning_rate", "adamw.weight_decay") may change between two steps.
    """
    return [
        Fault(
            where=name,
            code="not_live",
            what=f"'{name}' cannot change in the middle of a run.",
            why="What was saved was built with the other value: shapes, order of the data and counters belong to it.",
            way_out="Leave it as it was, or start again from the beginning with the change.",
        )
        for name in differing(before, after)
        if name.removeprefix("settings.") not in (*PLAN, *COMPUTING) and not is_live(name)
    ]


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps at which a job's folder holds a finished checkpoint, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / CHECKPOINTS).glob("step-*"))


def lay_fork(source: Path, step: int, target: Path, *, name: str, recipe: Mapping[str, Any]) -> None:
    """Make `target` the folder of a run that goes on from checkpoint `step` of the job in `source`, whose resolved recipe is `recipe`.

    Raises an EngineError when that checkpoint is not there (any more).
    """
    start = source / CHECKPOINTS / f"step-{step:08d}"
    try:
        state = json.loads((start / "state.json").read_text(encoding="utf-8"))
        best = int((state.get("best") or {}).get("step", step))
        (target / CHECKPOINTS).mkdir(parents=True, mode=0o700)
        for number in {step, best}:
            saved = source / CHECKPOINTS / f"step-{number:08d}"
            if number <= step and saved.exists():
                shutil.copytree(saved, target / CHECKPOINTS / saved.name, copy_function=link)
        link(str(source / LOG_NAME), str(target / ORIGIN))
    except (OSError, ValueError) as error:
        raise bad_input(
            "fork.step",
            f"There is no saved state at step {step:,}.",
            "A run keeps its newest states and its best one; the others make room for them.",
            "Choose one of the states that are listed.",
            "no_checkpoint",
        ) from error
    write_json(target / FORK, {"step": step, "name": name, "recipe": dict(recipe)})


def begin_log(folder: Path) -> None:
    """Give a fork the curve of the run it left, up to the step where it left it; does nothing when it has a log or is no fork."""
    log, origin, fork = folder / LOG_NAME, folder / ORIGIN, fork_of(folder)
    if fork is None or log.exists() or not origin.exists():
        return
    state = json.loads((folder / CHECKPOINTS / f"step-{fork.step:08d}" / "state.json").read_text(encoding="utf-8"))
    beside = log.with_suffix(".tmp")
    with beside.open("wb") as file:
        number = 0
        for event, _ in read_events(origin):
            if event.seq > int(state["event"]):
                break
            if event.kind in _CURVES:
                number += 1
                file.write(Event(number, event.time, event.kind, event.step, event.data).line())
        file.flush()
        os.fsync(file.fileno())
    beside.rename(log)
    origin.unlink()


def link(source: str, target: str) -> None:
    """The same file under a second name; a copy where the file system cannot. For files into which nobody writes any more."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _flat(recipe: Recipe) -> dict[str, Any]:
    body = recipe.model_dump(mode="json", exclude={"name", "settings", "methods"})
    found = {**body, **{f"settings.{name}": value for name, value in recipe.settings.model_dump(mode="json").items()}}
    for place, ref in enumerate(recipe.methods):
        found[f"methods[{place}]"] = ref.slug
        found |= {f"{ref.slug}.{name}": value for name, value in ref.params.items()}
    return found
