"""Back-propagation: the ordinary training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.core.method import Card, Cost, TrainMethod
from engine.core.slots import Slot
from engine.parts.optimizers import gradient_norm
from engine.train.parts import PartContext, StepReport, UpdateRule
from engine.train.trainables import set_rates

if TYPE_CHECKING:
    from engine.train.run import Run


class OrdinaryStep(UpdateRule):
    """Loss and terms of every micro-batch → backward → norm → gradient rules → schedule → optimizer."""

    def update(self, run: Run, micro: list[dict[str, Tensor]]) -> StepReport:
        clock = run.clock
        # Counts are read before the device gets work to do, so that reading them waits for nothing.
        weights = [run.objective.weight(batch) for batch in micro]
        whole = max(1.0, sum(weights))
        sizes = [int(batch["num_samples"]) for batch in micro]
        samples = sum(sizes)
        tokens = sum(int(batch["num_tokens"]) for batch in micro)

        logged = torch.zeros((), device=run.device)
        extra: dict[str, Any] = {}
        for batch, weight, size in zip(micro, weights, sizes, strict=True):
            with run.autocast():
                loss = run.objective.loss(run.model, batch, run.rng)
                total = loss.total / whole
                for term in run.terms:
                    total = total + term.term(run.model, batch, loss, weight / whole)
            total.backward()
            logged += loss.total.detach() / whole
            if len(micro) > 1 and not extra and weight > 0:
                # The first piece beside the whole tells noise from signal; its gradient is that of its own mean loss.
                piece = gradient_norm(run.trainables) * (whole / weight)
                extra = {"micro_norm": piece, "micro_size": size, "batch_size": samples}

        norm = gradient_norm(run.trainables)
        for rule in run.rules:
            extra.update(rule.apply(run.trainables, norm))
        rate = set_rates(run.optimizer, run.schedule, clock, run.settings.learning_rate or 0.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return StepReport(
            step=clock.step + 1,
            loss=logged,
            grad_norm=norm,
            learning_rate=rate,
            samples=clock.samples + samples,
            tokens=clock.tokens + tokens,
            epoch=(clock.step + 1) / max(1, clock.steps_per_epoch),
            weight=whole,
            extra=extra,
        )


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
