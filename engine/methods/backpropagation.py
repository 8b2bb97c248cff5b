"""Back-propagation: the ordinary training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.method import Card, Cost, TrainMethod
from engine.core.slots import Slot
from engine.parts.ordinary_step import OrdinaryStep
from engine.train.parts import PartContext


class Backpropagation(TrainMethod):
    """The step that stands in every recipe which names no other."""

    card = Card(
        slug="backpropagation",
        title="Back-propagation",
        pick_when="Pick this when a recipe needs nothing special: it is the ordinary training step, and it stands there without being named.",
        summary="The loss of a whole batch is computed piece by piece, its gradient flows back through the model, gradient rules may change it, and "
        "the optimizer moves what learns.",
        algorithm=(
            "Count the supervised items of all micro-batches of the optimizer batch.",
            "For each micro-batch: objective / whole count, plus the loss terms; backward.",
            "Take the L2 norm over all gradients, before any gradient rule; it goes into the log.",
            "Apply the gradient rules in their order.",
            "Set the learning rate from the schedule; optimizer step; forget the gradients.",
        ),
        avoid_when="The method itself differentiates through a step, or has two losses that move different weights.",
        traps=(
            "Cutting a batch into micro-batches must not change the step: everything is divided by the count of the whole batch.",
        ),
        cost=Cost(time=2, memory=2, size=1),
        family="Update rules",
    )
    slots = (Slot.UPDATE_RULE,)
    default = True

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [OrdinaryStep()]
