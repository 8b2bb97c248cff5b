"""SparseGPT: delete weights one column at a time and let the rest of each row make up for it (arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, TransformMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.parts.chain import prune_and_write, prune_sparsegpt
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


class SparseGPT(TransformMethod):
    """Optimal-brain-surgeon updates, column after column."""

    num_models = (1, 1)
    needs_data = True
    presets = {"tiny": {"samples": 8}, "paper": {"sparsity": 0.5, "samples": 128, "damping": 0.01, "block": 128}}
    card = Card(
        slug="sparsegpt",
        title="SparseGPT",
        pick_when="Pick this when you want to delete many of a model's numbers in one go and lose as little as possible without training, and have a few texts "
        "that are like what it will read.",
        summary="When a weight is deleted, its neighbours in the same row can take over part of its work. A few texts are read to learn which inputs of a layer "
        "go together; then weights are deleted from left to right, and after each one the weights to its right are corrected.",
        paper="SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot",
        year=2023,
        arxiv="2301.00774",
        algorithm=(
            "Run a few texts up to the first block and note what enters it.",
            "Block after block: run it and sum H = X X^T for every linear layer; places of padding are left out.",
            "Add a little to the diagonal of H and factor its inverse: H^-1 = U^T U.",
            "Go through the columns in runs of 128. In each run choose the weights with the smallest w^2 / U_jj^2, or n of every m when their group begins.",
            "Column by column: delete the chosen weights and spread each error over the columns behind it, along row j of U; after a run, over all later runs.",
            "Run the block again, now pruned: what leaves it enters the next block.",
            "Write the weights with exact zeros, and the mask in bits beside them.",
        ),
        avoid_when="You want the kept weights untouched, or the model is so wide that a matrix of inputs by inputs does not fit: take Wanda.",
        traps=(
            "A column never helps the columns before it, so the order matters; the result is not the best one for the mask.",
            "Few or similar texts make H singular: it needs the damping.",
            "Inputs that never fire have no say; their weights are set to zero first and count as kept or deleted like any other.",
            "It fits the calibration texts: with too few of them the corrections fit noise.",
            "Zeros alone do not make a model smaller or quicker: only 2:4 does, on hardware that knows it.",
        ),
        figures=(
            Figure(claim="OPT-175B at 50 %, time on one GPU and loss of accuracy", paper="under 4.5 hours, minimal (abstract)"),
            Figure(
                claim="LLaMA-7B at 50 %, perplexity on WikiText",
                paper="7.22, dense 5.68 (unconfirmed, from the Wanda paper)",
                ours="loss jump of 2.30 at 60 % and 1.99 at 2:4, magnitude 2.82 and 3.30 (stories260k, 2 seeds)",
            ),
        ),
        cost=Cost(time=3, memory=4, size=5),
        family="Sparsity",
    )  # fmt: skip

    class Params(HyperParams):
        """What is deleted, how much is read, and how the inverse is made safe."""

        sparsity: float = sparsity_dial()
        pattern: PatternName = pattern_dial()
        samples: int = samples_dial()
        damping: float = dial(
            0.01,
            label="Damping",
            unit="share",
            low=1e-6,
            high=10.0,
            paper=0.01,
            help="This share of the average diagonal is added before the inverse; more is safer and corrects less.",
        )
        block: int = dial(
            128,
            label="Columns in a run",
            unit="columns",
            low=1,
            high=4096,
            paper=128,
            help="How many columns are chosen from at once; the share is deleted evenly over such runs.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        return prunable_verdict(cls.card.title, facts.model)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        return pattern_faults(params.pattern, prunable(facts.model))

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: WorkContext) -> None:
        """Write the model with weights deleted and the rest of their rows corrected."""
        p = self.params
        pattern = Pattern.of(p.pattern, p.sparsity)
        prune_and_write(
            inputs[0], out, ctx, self.card.title, p.pattern, p.samples,
            lambda name, module, seen: prune_sparsegpt(name, module, seen, pattern, damping=p.damping, block=p.block), full=True,
        )  # fmt: skip
