"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from engine.core.facts import Facts
from engine.core.method import Card, Cost, Suggestion, TrainMethod
from engine.core.params import HyperParams
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.optimizers import full_rate
from engine.parts.targets import above, top_blocks_dial
from engine.train.parts import Parametrization, PartContext


class EveryWeight(Parametrization):
    """All parameters learn, in fp32, or those of them that `names` holds; weights that are tied learn once."""

    spares_frozen_blocks = True

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.names = names

    def attach(self, model: nn.Module) -> None:
        """Nothing is added to the model."""

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {
            name: parameter for name, parameter in model.named_parameters() if self.names is None or name in self.names
        }

    def merge(self, model: nn.Module) -> bool:
        return True


class FullFinetuning(TrainMethod):
    """Every weight learns; the reference that lighter methods are measured against."""

    card = Card(
        slug="full-finetuning",
        title="Full fine-tuning",
        pick_when="Pick this when you want the most the model can learn from your examples, and memory and the size of the result do not matter.",
        summary="Every number in the model may change. It learns the most and forgets the most, needs about four times the memory of the model "
        "itself, and the result is a complete model.",
        algorithm=(
            "Load all weights in fp32.",
            "For each batch compute the loss and its gradient for every weight.",
            "Let the optimizer move every weight.",
            "The result is the whole model; there is no small file to take home.",
        ),
        avoid_when="There are only a few dozen examples, the model is large for this machine, or you want to keep many variants of one model.",
        traps=(
            "A learning rate that suits an adapter destroys a pretrained model when every weight moves: use ten times less.",
            "Input embedding and output layer are often one and the same tensor; it must be moved once, not twice.",
            "Weights kept in bf16 swallow small updates: what learns is kept in fp32 here.",
        ),
        cost=Cost(time=4, memory=5, size=5),
        family="Baselines",
        first_choice=True,
    )
    slots = (Slot.PARAMETRIZATION,)
    cannot = {"adapter": "Every weight changes, so the complete model is the only form of the result."}

    class Params(HyperParams):
        """Hyperparameters of full fine-tuning."""

        top_blocks: int | None = top_blocks_dial(low=0)

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(above(facts.model.tensors, facts.model, params.top_blocks))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        return facts.model.num_parameters if params.top_blocks is None else super().num_trainable(params, facts)

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        if facts.model.kind == "encoder":
            rate = full_rate(facts.model)
            reason = (
                f"{rate:g} is a usual rate when every weight of a pretrained encoder of {size:,} parameters learns."
            )
            return [Suggestion(where="settings.learning_rate", value=rate, reason=reason)]
        rate = full_rate(facts.model)
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"Every weight learns, and a language model of {size:,} parameters takes steps of {rate:g} well; "
                "larger models need smaller ones.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        every = self.params.top_blocks is None
        return [EveryWeight(None if every else self.claims(self.params, ctx.facts))]
