"""Task arithmetic: add the changes of several fine-tuned models to their common base (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator
from torch import Tensor

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure
from engine.core.params import HyperParams, dial
from engine.parts.merging import (
    MergeMethod,
    count_fault,
    descendants,
    heads_dial,
    kept_mask,
    numbers_text,
    per_model,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext


class TaskArithmetic(MergeMethod):
    """theta = theta_base + lambda * sum_i w_i (theta_i - theta_base)."""

    num_models = (2, None)
    presets = {"tiny": {}, "paper": {"scale": 0.4}}
    card = Card(
        slug="task-arithmetic",
        title="Task arithmetic",
        pick_when="Pick this when you hold several fine-tuned copies of one base model, each good at a different job, and want the simplest way to "
        "put their skills into one model, or to take a skill away.",
        summary="What a model learned is the difference between its numbers and those of the base. These differences are added up, scaled, and put on the "
        "base. A negative weight takes away what a model learned.",
        paper="Editing Models with Task Arithmetic",
        year=2022,
        arxiv="2212.04089",
        family="Merging",
        algorithm=(
            "Inputs: the model is the base, the further models are those that were fine-tuned from it.",
            "Task vectors tau_i = theta_i - theta_base, in fp32.",
            "Optional (DARE): drop each number of tau_i with probability p and divide what stays by 1 - p.",
            "theta = theta_base + lambda * sum_i w_i tau_i; tensors are read and written one by one.",
        ),
        avoid_when="The jobs pull the same weights in opposite directions: TIES and parameter competition handle conflicts, a plain sum does not.",
        traps=(
            "The scale decides everything: at 1 the changes of many models add up too far. Choose it on held-out examples.",
            "The base must be exactly the model that every fine-tuning started from.",
        ),
        figures=(
            Figure(
                claim="Digits, four subsets of classes in one small network, mean accuracy",
                paper="not given",
                ours="0.860 with a strength tuned on validation rows (0.2 to 0.4), 0.509 at strength 1 (3 seeds)",
            ),
            Figure(
                claim="Llama of 260 thousand numbers, a novel and a science book, mean held-out loss",
                paper="not given",
                ours="2.885 at strength 0.6, 3.165 at 1; soup 2.898 (2 seeds)",
            ),
            Figure(
                claim="Eight image tasks, CLIP ViT-B/32, average accuracy",
                paper="70.1 (as re-measured in a later paper)",
            ),
        ),
        cost=Cost(time=1, memory=1, size=5),
    )

    class Params(HyperParams):
        """How the changes are added."""

        scale: float = dial(
            0.4,
            label="Strength of the changes",
            unit="1",
            low=-3.0,
            high=3.0,
            tier="basic",
            help="Multiplies the sum of all changes: 1 adds them in full, less is more careful, below zero takes them away.",
        )
        weights: str = dial(
            "",
            label="Weights of the models",
            help="How much each fine-tuned model counts, in their order, like '1, 0.5'; empty means 1 for all.",
        )
        drop: float = dial(
            0.0,
            label="Share dropped at random",
            unit="share",
            low=0.0,
            high=0.999,
            help="Drops this share of every model's changes at random and enlarges the rest to make up for it (DARE), so that models collide less.",
        )
        drop_seed: int = dial(
            17, label="Seed of the dropping", unit="1", low=0, high=2**31 - 1, help="Another seed drops others."
        )
        heads: Literal["refuse", "base", "first"] = heads_dial("refuse", "base", "first")

        _numbers = field_validator("weights")(numbers_text)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        """As many numbers as models."""
        return count_fault(params.weights, facts, "weights", base=True)

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write base + scaled sum of the changes. inputs[0] is the base."""
        self.require_models(inputs)
        family = descendants(inputs, ctx, heads=self.params.heads)
        weights = per_model(self.params.weights, family.models, "params.weights", 1.0) * self.params.scale
        drop, seed = self.params.drop, self.params.drop_seed

        def change(name: str, vectors: Tensor) -> Tensor:  # [n, d] -> [d]
            if drop:
                for place, row in enumerate(vectors):
                    row.mul_(kept_mask(seed, f"{place}/{name}", row.numel(), drop)).div_(1 - drop)
            return weights.to(vectors.dtype) @ vectors

        family.write_changes(out, ctx, change)
        ctx.report["weights"] = {
            model.folder.name: round(float(w), 6) for model, w in zip(family.models, weights, strict=True)
        }
