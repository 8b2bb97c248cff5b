"""Constant schedule: the same learning rate all the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.method import Card, Cost, TrainMethod
from engine.core.slots import Slot
from engine.parts.schedules import Rising, Shaped, level
from engine.train.parts import PartContext


class Constant(TrainMethod):
    """The same learning rate after a gentle start."""

    card = Card(
        slug="constant",
        title="Constant rate",
        pick_when="Pick this when you do not know how long you will train, or want to stop and go on at will.",
        summary="After a gentle start the learning rate stays the same until the end, so a run can be stopped or extended at any moment.",
        algorithm=(
            "Rise: step t of w warm-up steps uses the factor t / (w + 1).",
            "Then: the factor 1 to the end.",
        ),
        avoid_when="The length of the run is known: a falling rate nearly always ends at a lower loss.",
        traps=("The last steps still jump about; the final model is noisier than with a falling rate.",),
        cost=Cost(time=1, memory=1, size=1),
        family="Schedules",
    )
    slots = (Slot.SCHEDULE,)
    presets = {"tiny": {}, "paper": {"warmup": 0.0}}

    class Params(Rising):
        """Hyperparameters of the schedule."""

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [Shaped(self.params.warmup, level)]
