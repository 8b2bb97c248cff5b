"""Cross-entropy: learn to give the right answer a high probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.facts import Facts
from engine.core.method import Card, Cost, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.slots import Slot
from engine.parts.losses import cross_entropy_sum, head_cross_entropy_sum, num_supervised
from engine.tasks.base import Task
from engine.train.parts import Loss, Objective, PartContext


class LikelyAnswer(Objective):
    """The sum of -log p(right answer) over the supervised places of a micro-batch, in fp32."""

    spares_frozen_blocks = True

    def __init__(self, task: Task, label_smoothing: float) -> None:
        self.task, self.label_smoothing = task, label_smoothing

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(num_supervised(batch["labels"]))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator) -> Loss:
        states = self.task.forward_states(model, batch)
        if states is not None:
            return Loss(total=head_cross_entropy_sum(states, self.label_smoothing), weight=float(len(states.labels)))
        logits, labels = self.task.forward_logits(model, batch)  # [n, classes], [n]
        return Loss(total=cross_entropy_sum(logits, labels, self.label_smoothing), weight=float(labels.shape[0]))


class CrossEntropy(TrainMethod):
    """The ordinary objective for topics and for text."""

    card = Card(
        slug="cross-entropy",
        title="Cross-entropy",
        pick_when="Pick this when every example shows the right answer: a topic, the next word, a reply. It is the ordinary way to learn.",
        summary="The model is asked for the probability of the right answer and moves so that it becomes larger. Every supervised place of a whole "
        "batch counts the same, however the batch is cut into pieces.",
        algorithm=(
            "Compute the model's scores at the supervised places only.",
            "Sum -log p(right answer) over them, in fp32.",
            "Divide by the number of supervised places of the whole optimizer batch.",
        ),
        avoid_when="You have judgements such as 'this reply is better than that one' instead of right answers.",
        traps=(
            "Averaging each micro-batch by itself gives short texts too much weight; here the sum is divided once.",
            "With label smoothing the logged loss can no longer reach zero.",
        ),
        cost=Cost(time=2, memory=2, size=1),
        family="Objectives",
    )
    slots = (Slot.OBJECTIVE,)
    default = True

    class Params(HyperParams):
        """Hyperparameters of cross-entropy."""

        label_smoothing: float = dial(
            0.0,
            label="Doubt",
            unit="share",
            low=0.0,
            high=0.9,
            paper=0.0,
            live=True,
            help="This share of certainty is given to the wrong answers, against over-confidence and wrong labels.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        if facts.data.shape == "preferences":
            return Verdict(
                False,
                "These data show a better and a worse answer, and it would learn both of them.",
                "Choose an objective for preferences, such as DPO.",
            )
        return super().supports(facts)

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [LikelyAnswer(ctx.task, self.params.label_smoothing)]
