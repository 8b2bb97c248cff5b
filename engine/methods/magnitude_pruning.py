"""Magnitude pruning: the smallest weights of every layer become zero; the oldest criterion and the one to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, TransformMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.parts.pruning import (
    Pattern,
    PatternName,
    pattern_dial,
    pattern_faults,
    prunable,
    prunable_in,
    prunable_verdict,
    save_masks,
    sparsity_dial,
    summary,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext


class MagnitudePruning(TransformMethod):
    """W = M * W with M from |W| alone."""

    num_models = (1, 1)
    presets = {"tiny": {}, "paper": {"sparsity": 0.5, "score": "magnitude"}}
    card = Card(
        slug="magnitude-pruning",
        title="Magnitude pruning",
        pick_when="Pick this when you want to delete a share of a model's numbers in seconds, without any text to look at, and repair it afterwards.",
        summary="In every layer the weights that are nearest to zero are deleted. It needs nothing but the model itself. The model gets clearly worse; "
        "PERP or MaskLoRA bring most of the quality back.",
        paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (the criterion is older)",
        year=2023,
        arxiv="2312.15230",
        algorithm=(
            "Take every linear layer inside the blocks; embeddings, output layer, norms and offsets stay.",
            "Unstructured: in each matrix delete exactly the asked share with the smallest |W|; of equal weights those that come first go.",
            "n:m: of every m neighbouring weights of a row keep the n largest.",
            "As a baseline, random numbers can take the place of |W|.",
            "Write the weights with exact zeros, and the mask in bits beside them.",
        ),
        avoid_when="You have a little text like the model's own: Wanda and SparseGPT look at it and delete what matters less.",
        traps=(
            "A threshold deletes all equal weights or none of them, so that coarse number formats miss the asked share; here the count is exact.",
            "n:m is said in two ways; here n of m are kept, so 1:4 deletes three quarters.",
            "Zeros alone do not make a model smaller or quicker: only 2:4 does, on hardware that knows it.",
            "GPT-2 keeps its weights in another form and is refused.",
        ),
        figures=(
            Figure(
                claim="Magnitude pruning followed by repair of under 1 % of the weights, against full retraining",
                paper="on par (abstract)",
                ours="87 % against 91 % of the loss jump comes back (stories260k, 60 % deleted by magnitude, 200 steps, 2 "
                "seeds; MaskLoRA of rank 16 is a third of that small model)",
            ),
        ),
        cost=Cost(time=1, memory=1, size=5),
        family="Sparsity",
    )  # fmt: skip

    class Params(HyperParams):
        """What is deleted."""

        sparsity: float = sparsity_dial()
        pattern: PatternName = pattern_dial()
        score: Literal["magnitude", "random"] = dial(
            "magnitude",
            label="Delete by",
            paper="magnitude",
            help="The smallest weights, or random ones: a baseline that shows what the choice is worth.",
        )
        mask_seed: int = dial(
            17,
            label="Seed of random",
            unit="1",
            low=0,
            high=2**31 - 1,
            help="Another seed deletes other random weights.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        return prunable_verdict(cls.card.title, facts.model)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        return pattern_faults(params.pattern, prunable(facts.model))

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write the model with the smallest weights of every layer zeroed, one tensor at a time."""
        model, p = inputs[0], self.params
        homes = set(prunable_in(model.folder, model, self.card.title, p.pattern).values())
        pattern = Pattern.of(p.pattern, p.sparsity)
        masks: dict[str, Tensor] = {}
        with out.weights(model.layout) as writer:
            for name in writer.order:
                tensor = model[name]
                if name in homes:
                    masks[name] = pattern.keep(self._score(name, tensor))
                    tensor = torch.where(masks[name], tensor, torch.zeros((), dtype=tensor.dtype))
                writer.put(name, tensor)
                ctx.progress(len(writer.hashes), len(writer.order))
        save_masks(out.folder, masks)
        ctx.report["mask"] = summary(masks)

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if self.params.score == "magnitude":
            return weight.float().abs()
        from engine.train.parts import seeded

        return torch.rand(weight.shape, generator=seeded(self.params.mask_seed, "random pruning", name))
