"""Wanda: delete weights by their size times the size of what flows through them (arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, TransformMethod, Verdict
from engine.core.params import HyperParams
from engine.parts.chain import prune_and_write, prune_wanda
from engine.parts.pruning import (
    Pattern,
    PatternName,
    pattern_dial,
    pattern_faults,
    prunable,
    prunable_verdict,
    samples_dial,
    sparsity_dial,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder
    from engine.ops.work import WorkContext


class Wanda(TransformMethod):
    """Score |W_ij| * ||x_j||, compared within every row."""

    num_models = (1, 1)
    needs_data = True
    presets = {"tiny": {"samples": 8}, "paper": {"sparsity": 0.5, "samples": 128}}
    card = Card(
        slug="wanda",
        title="Wanda",
        pick_when="Pick this when you want to delete a share of a model's numbers within minutes and have a few texts at hand that are like what it will read.",
        summary="A weight matters when it is large and when much flows through it. A few texts are read to see how strong each input of each layer is; "
        "then the weights with the smallest product go. The kept weights stay exactly as they were.",
        paper="A Simple and Effective Pruning Approach for Large Language Models",
        year=2023,
        arxiv="2306.11695",
        algorithm=(
            "Run a few texts up to the first block and note what enters it.",
            "Block after block: run it and sum the squares of every input j of every linear layer, ||x_j||^2; places of padding are left out.",
            "Score each weight: |W_ij| * ||x_j||_2. In every row delete exactly the asked share with the smallest score; with n:m keep n of every m neighbours.",
            "Run the block again, now pruned: what leaves it enters the next block.",
            "Write the weights with exact zeros, and the mask in bits beside them.",
        ),
        avoid_when="More than about 60 % must go, or the pattern is 2:4 and quality matters most: SparseGPT also corrects the kept weights.",
        traps=(
            "Scores are compared within a row, not over the whole matrix; over the whole matrix it is clearly worse.",
            "The inputs must come from the blocks that are already pruned, or the later blocks are measured on what they will never see.",
            "Texts of another kind than the model will read give the wrong strengths.",
            "Zeros alone do not make a model smaller or quicker: only 2:4 does, on hardware that knows it.",
        ),
        figures=(
            Figure(
                claim="LLaMA-7B at 50 %, perplexity on WikiText against magnitude pruning",
                paper="7.26 against 17.29, dense 5.68 (unconfirmed)",
                ours="loss jump of 2.59 against 2.82 at 60 %, 2.77 against 3.30 at 2:4 (stories260k, 2 seeds)",
            ),
        ),
        cost=Cost(time=2, memory=3, size=5),
        family="Sparsity",
    )  # fmt: skip

    class Params(HyperParams):
        """What is deleted, and how much is read."""

        sparsity: float = sparsity_dial()
        pattern: PatternName = pattern_dial()
        samples: int = samples_dial()

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        return prunable_verdict(cls.card.title, facts.model)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        return pattern_faults(params.pattern, prunable(facts.model))

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: WorkContext) -> None:
        """Write the model with the weights of the smallest score zeroed."""
        p = self.params
        pattern = Pattern.of(p.pattern, p.sparsity)
        prune_and_write(
            inputs[0], out, ctx, self.card.title, p.pattern, p.samples,
            lambda name, module, seen: prune_wanda(module, seen, pattern), full=False,
        )  # fmt: skip
