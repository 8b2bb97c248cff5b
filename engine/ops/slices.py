"""What a slice of a trial tells the search: the numbers of its log, who it may be compared with, and its line in the live table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.events import LOG_NAME, EventLog, read_events
from engine.core.method import SearchMethod
from engine.core.recipe import canonical
from engine.core.slots import Slot
from engine.core.work import Trial
from engine.parts import signals
from engine.train.run import Run

DROPPED = 5  # first steps that no window judges, or the warm-up if it is longer
_SAME = (
    Slot.OBJECTIVE,
    Slot.LOSS_TERM,
    Slot.GRADIENT_RULE,
    Slot.DATA_POLICY,
)  # what shapes loss and norm besides the weights that learn


def numbers_of(run: Run, home: Path) -> dict[str, Any]:
    """The numbers of a slice for engine.core.work.Mark: samples, steps, held-out scores, the window so far, and the comparable group."""
    return {
        "samples": run.clock.samples,
        "planned_samples": run.clock.planned_samples,
        "total_steps": run.clock.total_steps,
        "heldout": _plain(run.scores),
        "early": early(home, run.clock.samples, run.warmup_steps),
        "group": comparable(run),
    }


def early(home: Path, samples: int, warmup_steps: int) -> dict[str, float]:
    """The window over everything that a trial has logged up to `samples`; empty when that is too short.

    A short window gives up at most half of its steps at the start, where a long one gives up five or the warm-up.
    """
    steps: list[signals.Step] = []
    before = (0, 0)
    for event, _ in read_events(home / LOG_NAME):
        for row in event.data["rows"] if event.kind == "metric" else ():
            if row["samples"] <= samples:
                steps.append(signals.read_step(row, row["step"], row["samples"], before))
                before = (row["samples"], int(row.get("tokens") or 0))
    seen = signals.window(steps, 1.0, samples, min(max(DROPPED, warmup_steps), len(steps) // 2))
    return _plain(seen.numbers()) if seen is not None else {}


def comparable(run: Run) -> str:
    """A key that is equal for runs whose norm and training loss mean the same.

    The same base weights, data, order seed, task with its mask and weighting of tokens, gradient rules with their limit for clipping, number format,
    and the same numbers learning. Learning rate and batch size may differ.
    """
    recipe = run.recipe
    shaping = [
        (chosen.slug, chosen.params.model_dump(mode="json"))
        for slot in _SAME
        for chosen in run.composition.in_slot(slot)
    ]
    settings = {name: getattr(recipe.settings, name) for name in ("seed", "precision", "max_length", "holdout")}
    inputs = [recipe.task, recipe.model.model_dump(), recipe.data.model_dump() if recipe.data else None]
    learning = sorted((name, list(parameter.shape)) for name, parameter in run.trainables.items())
    return hashlib.sha256(canonical([inputs, settings, shaping, learning]).encode()).hexdigest()[:12]


class TrialTable:
    """Tells the log what has become of every trial, once for every change; a replay says nothing twice."""

    def __init__(self, method: SearchMethod, log: EventLog) -> None:
        self.method, self.log = method, log
        self._said: dict[int, dict[str, Any]] = {}

    def running(self, trial: Trial, done: int, total: int, step: int) -> None:
        """A slice of this trial begins. done, total: its steps; step: of the whole search."""
        self._tell(trial, "running", "", done, total, step)

    def standing(self, trials: Mapping[int, Trial], step: int) -> None:
        """A slice has ended; any trial may stand differently now."""
        for trial in trials.values():
            state, message = self.method.standing(trial)
            total = trial.marks[-1].total_steps if trial.marks else 0
            self._tell(trial, state, message, trial.step, total, step)

    def _tell(self, trial: Trial, state: str, message: str, done: int, total: int, step: int) -> None:
        before = self._said.get(trial.number, {})
        data = {
            "trial": trial.number,
            "state": state,
            "done": done,
            "total": total or before.get("total", 0),
            "score": trial.score if math.isfinite(trial.score) else None,
            "values": dict(trial.values),
            "message": message,
        }
        if data != before:
            self._said[trial.number] = data
            self.log.emit("trial", data, step=step, key=f"{trial.number}/{state}/{len(trial.marks)}/{message}")


def _plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers alone: a record is JSON."""
    return {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
