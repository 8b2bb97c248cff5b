"""TIES: trim each model's changes, elect a sign for every weight, and average those that agree (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure
from engine.core.params import HyperParams, dial
from engine.parts.merging import (
    PIECE,
    Family,
    MergeMethod,
    count_fault,
    descendants,
    heads_dial,
    kept_mask,
    numbers_text,
    order_statistics,
    per_model,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext


class TiesMerging(MergeMethod):
    """theta = theta_base + lambda * mean of the trimmed changes whose sign won."""

    num_models = (2, None)
    presets = {"tiny": {}, "paper": {"keep": 0.2, "scale": 1.0}}
    card = Card(
        slug="ties-merging",
        title="TIES",
        pick_when="Pick this when you hold several fine-tuned copies of one base model, each good at a different job, and adding their changes up makes "
        "them disturb each other.",
        summary="Most changes of a fine-tuned model are small and not needed. Only the largest stay. Where the models want to move a weight in opposite "
        "directions, the stronger side wins, and only its models are averaged.",
        paper="TIES-Merging: Resolving Interference When Merging Models",
        year=2023,
        arxiv="2306.01708",
        family="Merging",
        algorithm=(
            "Inputs: the model is the base, the further models are those that were fine-tuned from it.",
            "Task vectors tau_i = theta_i - theta_base, in fp32.",
            "Trim: keep the share k with the largest |tau_i| over the whole model, put the rest to zero. With 'random' (DARE-TIES): keep each with "
            "probability k and divide by k.",
            "Elect: the sign of sum_i tau_i for every weight ('frequency': the sign of most models).",
            "Merge: average w_i tau_i over the models whose sign was elected; theta = theta_base + lambda * average.",
            "Thresholds are exact: two passes over the files count bit patterns, a third one merges, so no model is ever in memory.",
        ),
        avoid_when="There is only one fine-tuned model, or all were trained on the same job: then an average (soup) is simpler and as good.",
        traps=(
            "Trimming over the whole model and trimming within each tensor give different results; the paper does the first, several libraries the second.",
            "The scale has to be chosen on held-out examples; 1 is the paper's value without any.",
        ),
        figures=(
            Figure(
                claim="Digits, four subsets of classes in one small network, mean accuracy",
                paper="above the plain sum",
                ours="0.780; plain sum 0.509, tuned sum 0.860 (3 seeds)",
            ),
            Figure(
                claim="Llama of 260 thousand numbers, a novel and a science book, mean held-out loss",
                paper="not given",
                ours="2.916 with half kept; soup 2.898, sum at 1 3.165 (2 seeds)",
            ),
            Figure(
                claim="Eight image tasks, CLIP ViT-B/32, average accuracy",
                paper="73.6 (as re-measured in a later paper)",
            ),
            Figure(
                claim="Eight image tasks, CLIP ViT-L/14, average accuracy",
                paper="86.0 (as re-measured in a later paper)",
            ),
        ),
        cost=Cost(time=2, memory=1, size=5),
    )

    class Params(HyperParams):
        """How much stays and how it is averaged."""

        keep: float = dial(
            0.2,
            label="Share of changes kept",
            unit="share",
            low=0.001,
            high=1.0,
            tier="basic",
            help="The share of each model's changes that survives the trimming.",
        )
        scale: float = dial(
            1.0,
            label="Strength of the changes",
            unit="1",
            low=-3.0,
            high=3.0,
            tier="basic",
            help="Multiplies the merged change before it is put on the base.",
        )
        weights: str = dial(
            "",
            label="Weights of the models",
            help="How much each fine-tuned model counts in the average, in their order, like '1, 0.5'; empty means 1 for all.",
        )
        trim: Literal["largest", "random"] = dial(
            "largest",
            label="Which changes are kept",
            help="'largest' keeps the biggest changes; 'random' keeps random ones and enlarges them to make up for the rest (DARE-TIES).",
        )
        scope: Literal["model", "tensor"] = dial(
            "model",
            label="Largest within",
            help="'model' compares the changes of the whole model, as the paper does; 'tensor' keeps the same share of every table of numbers.",
        )
        elect: Literal["total", "frequency"] = dial(
            "total",
            label="Direction decided by",
            help="'total' lets the larger sum of changes win, 'frequency' the larger number of models.",
        )
        trim_seed: int = dial(
            17, label="Seed of random trimming", unit="1", low=0, high=2**31 - 1, help="Another seed keeps others."
        )
        heads: Literal["refuse", "base", "first"] = heads_dial("refuse", "base", "first")

        _numbers = field_validator("weights")(numbers_text)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        """As many numbers as models."""
        return count_fault(params.weights, facts, "weights", base=True)

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write base + scaled mean of the changes that agree. inputs[0] is the base."""
        self.require_models(inputs)
        p = self.params
        family = descendants(inputs, ctx, heads=p.heads)
        weights = per_model(p.weights, family.models, "params.weights", 1.0)
        limits = self._limits(family) if p.trim == "largest" and p.scope == "model" else None
        kept, conflicts = torch.zeros(len(family.models), dtype=torch.int64), 0

        def change(name: str, vectors: Tensor) -> Tensor:  # [n, d] -> [d]
            nonlocal conflicts
            self._trim(name, vectors, limits)
            merged = torch.empty_like(vectors[0])
            for piece, target in zip(vectors.split(PIECE, dim=1), merged.split(PIECE), strict=True):
                agree = agreement(piece, p.elect)
                target.copy_(disjoint_mean(piece, agree, weights))
                conflicts += int(((piece != 0) & ~agree).any(0).sum())
            kept.add_((vectors != 0).sum(1))
            return merged * p.scale

        family.write_changes(out, ctx, change)
        size = family.num_elements()
        ctx.report.update(
            kept={model.folder.name: round(int(k) / size, 6) for model, k in zip(family.models, kept, strict=True)},
            conflicts=round(conflicts / size, 6),
        )

    def _limits(self, family: Family) -> Tensor:
        """The smallest |tau| that is kept, for every model: [n, 1]."""
        size = family.num_elements()
        rank = size - max(1, round(self.params.keep * size)) + 1
        return order_statistics(lambda: (piece.abs() for piece in family.stream()), [rank])

    def _trim(self, name: str, vectors: Tensor, limits: Tensor | None) -> None:
        """Put what is not kept to zero, in place."""
        p, size = self.params, vectors.shape[1]
        if p.trim == "random":
            for place, row in enumerate(vectors):
                row.mul_(kept_mask(p.trim_seed, f"{place}/{name}", size, 1 - p.keep)).div_(p.keep)
            return
        if limits is None:
            rank = size - max(1, round(p.keep * size)) + 1
            limits = torch.stack([row.abs().kthvalue(rank).values for row in vectors]).unsqueeze(1)
        vectors.mul_(vectors.abs() >= limits.to(vectors.dtype))


def agreement(vectors: Tensor, elect: str) -> Tensor:
    """Where a change has the elected sign; a tie elects plus: bool [n, d]."""
    votes = vectors.sum(0) if elect == "total" else vectors.sign().sum(0)
    return vectors.sign() == torch.where(votes >= 0, 1.0, -1.0)


def disjoint_mean(vectors: Tensor, agree: Tensor, weights: Tensor) -> Tensor:
    """The mean of w_i tau_i over the models that agree, zero where nobody does: [d]."""
    total: Tensor = weights.to(vectors.dtype) @ (vectors * agree)
    return total / agree.sum(0).clamp(min=1)
