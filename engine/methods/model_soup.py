"""Model soup: the weighted average of fine-tuned models (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator
from torch import Tensor

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure
from engine.core.params import HyperParams, dial
from engine.parts.merging import (
    MergeMethod,
    count_fault,
    heads_dial,
    numbers_text,
    per_model,
    siblings,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext


class ModelSoup(MergeMethod):
    """theta = sum_i w_i theta_i."""

    order = "any; the first model gives configuration and tokenizer"

    num_models = (2, None)
    presets = {"tiny": {}, "paper": {}}
    card = Card(
        slug="model-soup",
        title="Model soup",
        pick_when="Pick this when you trained one model several times, with other seeds or settings, and want one model that is a little better "
        "and steadier than each of them, at no cost when it runs.",
        summary="Takes the average of several models, number by number. Models that started from the same weights and were trained gently lie in one "
        "valley, and the middle of the valley is often lower than its edges. Models from different starts give nonsense.",
        paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
        year=2022,
        arxiv="2203.05482",
        family="Merging",
        algorithm=(
            "Inputs: the model and all further models are equals; the base that they were made from is not needed.",
            "Divide the weights of the models by their sum, unless told otherwise.",
            "For every tensor: add up weight * tensor in fp32, then round once to the type of the file.",
            "Numbers that are no weights (counters, positions) come from the first model; a word table stored twice is averaged once.",
        ),
        avoid_when="The models do different jobs: then use task arithmetic, TIES or parameter competition, which need the base too.",
        traps=(
            "Averaging only works inside of one valley: a high learning rate or a long training leaves it, and the average is worse than every part.",
            "Whether the soup is better is decided on held-out examples; the paper's greedy soup adds a model only when it helps there.",
        ),
        figures=(
            Figure(
                claim="Llama of 260 thousand numbers, a novel and a science book, mean held-out loss of the average",
                paper="not given",
                ours="2.898; the better single model 2.957, base 3.915 (2 seeds)",
            ),
            Figure(claim="ViT-G on ImageNet, greedy soup of fine-tuned models", paper="90.94 % top-1 (unconfirmed)"),
        ),
        cost=Cost(time=1, memory=1, size=5),
    )

    class Params(HyperParams):
        """Who counts how much."""

        weights: str = dial(
            "",
            label="Weights of the models",
            tier="basic",
            help="How much each model counts, in their order, like '0.7, 0.3'; empty means that all count the same.",
        )
        normalize: bool = dial(
            True,
            label="Weights add up to one",
            help="Divides the weights by their sum; without it the result is scaled, which is rarely wanted.",
        )
        heads: Literal["refuse", "first"] = heads_dial("refuse", "first")

        _numbers = field_validator("weights")(numbers_text)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        """As many numbers as models."""
        return count_fault(params.weights, facts, "weights", base=False)

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write the average of all inputs."""
        self.require_models(inputs)
        family = siblings(inputs, ctx, heads=self.params.heads)
        weights = per_model(self.params.weights, inputs, "params.weights", 1.0)
        if self.params.normalize:
            if abs(float(weights.sum())) < 1e-9:
                raise bad_input(
                    "params.weights",
                    "The weights add up to zero.",
                    "They cannot be divided by their sum.",
                    "Choose weights with a sum above zero, or switch off that they add up to one.",
                    "zero_sum",
                )
            weights = weights / weights.sum()

        def average(name: str) -> Tensor:
            total = family.read(inputs[0], name) * float(weights[0])
            for model, weight in zip(inputs[1:], weights[1:].tolist(), strict=True):
                total.add_(family.read(model, name), alpha=weight)
            return total

        family.write(out, ctx, average)
        ctx.report["weights"] = {
            model.folder.name: round(float(w), 6) for model, w in zip(inputs, weights, strict=True)
        }
