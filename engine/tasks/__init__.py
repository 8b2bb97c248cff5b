"""Tasks: what a model is asked to do. Each brings the head, the encoding, the collation, the metrics and the predictor."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from engine.core.errors import EngineError, Fault
from engine.tasks.base import Task


@functools.cache
def tasks() -> dict[str, Task]:
    """All tasks by name, found in this folder: every module-level instance of a Task."""
    found: dict[str, Task] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found.update({value.name: value for value in vars(module).values() if isinstance(value, Task)})
    return dict(sorted(found.items()))


def task(name: str) -> Task:
    """The task of this name, or a refusal that names those that exist."""
    if name not in tasks():
        raise EngineError(
            Fault(
                where="task",
                what=f"There is no goal called '{name[:60]}'.",
                why="Nothing in the engine knows what to measure for it.",
                way_out=f"Choose one of: {', '.join(tasks())}.",
                code="unknown_task",
            )
        )
    return tasks()[name]
