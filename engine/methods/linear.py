"""Linear schedule: the learning rate falls in a straight line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.method import Card, Cost, TrainMethod
from engine.core.slots import Slot
from engine.parts.schedules import Falling, Shaped, falling_line
from engine.train.parts import PartContext


class Linear(TrainMethod):
    """A gentle start, then a straight line down."""

    card = Card(
        slug="linear",
        title="Linear decay",
        pick_when="Pick this when the length of the run is fixed and you want the simplest falling learning rate.",
        summary="After a gentle start the learning rate falls in a straight line to its final share, so that the last steps settle.",
        algorithm=(
            "Rise: step t of w warm-up steps uses the factor t / (w + 1).",
            "Then: from 1 in a straight line to the final share at the end of the run.",
        ),
        avoid_when="You may want to train longer afterwards: the rate is used up at the end.",
        traps=("The line depends on the planned length; stopping early means the rate never came down.",),
        cost=Cost(time=1, memory=1, size=1),
        family="Schedules",
    )
    slots = (Slot.SCHEDULE,)
    presets = {"tiny": {}, "paper": {"warmup": 0.06}}

    class Params(Falling):
        """Hyperparameters of the schedule."""

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [Shaped(self.params.warmup, falling_line(self.params.final))]
