"""Block-wise reconstruction: teach every block of a pruned model to answer like the dense block, without any loss of the whole (arXiv 2312.15230)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, TransformMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.parts.chain import BlockChain, write_live
from engine.parts.pruning import mask_of, prunable_in, prunable_verdict, samples_dial, save_masks, summary
from engine.parts.reconstruct import Repair, SmallSet, reconstruct

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder
    from engine.ops.work import WorkContext


class BlockReconstruction(TransformMethod):
    """One MSE per block, on the inputs that the repaired blocks before it make."""

    num_models = (2, 2)
    needs_data = True
    presets = {"tiny": {"samples": 8, "steps": 8, "r": 4}, "paper": {"samples": 128, "learning_rate": 5e-4}}
    card = Card(
        slug="block-reconstruction",
        title="Block-wise reconstruction",
        pick_when="Pick this when a large model was pruned, you still have the dense one, and the machine has room for training one layer at a time but not "
        "the whole model.",
        summary="The pruned model is repaired block by block: each block gets the inputs that it will really see and learns to give the answer that the dense "
        "block would give. Only a small set of numbers learns, and deleted numbers stay deleted.",
        paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        year=2023,
        arxiv="2312.15230",
        algorithm=(
            "Inputs: first the pruned model, second the dense model that it was made from, and a few texts.",
            "Note what enters the first block, and go through the blocks in their order.",
            "Target of a block: the dense block's output on the inputs that the repaired blocks before it make.",
            "Train the block's small set (norms and offsets, and MaskLoRA or ScaleLoRA on its pruned layers) with the mean squared error; AdamW "
            "without decay, 10 % warm-up, a straight line down.",
            "Fold it in, with exact zeros where they were; a block that did not get better stays as it was.",
            "Run the repaired block once more: what leaves it enters the next one.",
        ),
        avoid_when="The whole model fits into training: PERP with retraining usually reaches a lower loss.",
        traps=(
            "It is called layer-wise in the text of the paper and is block-wise in its code: one error for the output of a whole transformer block.",
            "The published code prunes a block just before it is repaired; here the model is pruned as a whole first, so that any criterion can be used. For "
            "magnitude pruning both are the same.",
            "Errors add up over the blocks: a lower error in each block does not promise the same gain at the end.",
            "It fits the few texts it sees; too many steps on too few texts make the held-out loss worse.",
        ),
        figures=(
            Figure(
                claim="Improves magnitude pruning, Wanda and SparseGPT",
                paper="abstract; tables unconfirmed",
                ours="block errors fall to 17 to 36 %, 68 % of the loss jump comes back (stories260k, 60 % deleted by "
                "magnitude, 200 steps a block, 2 seeds)",
            ),
        ),
        cost=Cost(time=3, memory=2, size=5),
        family="Sparsity",
    )  # fmt: skip

    class Params(HyperParams):
        """What learns in each block, and for how long."""

        small_set: SmallSet = dial(
            "masklora",
            label="What learns",
            tier="basic",
            paper="masklora",
            help="masklora adds to the kept weights, scalelora scales them, norms moves only norms and offsets.",
        )
        with_vectors: bool = dial(
            True, label="Norms and offsets too", paper=True, help="Lets the norms and offsets of the block learn beside the thin matrices."
        )  # fmt: skip
        steps: int = dial(
            200,
            label="Steps for each block",
            unit="steps",
            low=1,
            high=100_000,
            tier="basic",
            help="How many corrections each block gets. More repairs more and fits the few texts more closely.",
        )
        learning_rate: float = dial(
            2e-3,
            label="Learning rate",
            unit="1",
            low=1e-6,
            high=1.0,
            paper=5e-4,
            help="How big a correction is made after each batch.",
        )
        r: int = dial(
            16, label="Rank", unit="1", low=1, high=4096, paper=16, help="How much room the thin matrices have; narrow layers take less."
        )  # fmt: skip
        alpha: float = dial(
            32.0, label="Strength", unit="1", low=0.01, high=65536, paper=32, help="How strongly the addition of masklora counts; it is divided by the rank."
        )  # fmt: skip
        warmup: float = dial(
            0.1, label="Gentle start", unit="share", low=0.0, high=0.9, paper=0.1, help="The learning rate rises over this share of the steps."
        )  # fmt: skip
        samples: int = samples_dial()

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        return prunable_verdict(cls.card.title, facts.model)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        if not facts.models or facts.models[0].tensors == facts.model.tensors:
            return []
        return [
            Fault(
                where="small_set", what="The two models do not have the same layers.",
                why="Each block learns to answer like the same block of the dense model.",
                way_out="Give the pruned model first and the model that it was made from second.", code="shapes_differ",
            )
        ]  # fmt: skip

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: WorkContext) -> None:
        """Write the pruned model with every block repaired."""
        p, pruned = self.params, inputs[0]
        homes = prunable_in(pruned.folder, pruned, self.card.title)
        model, dense = ctx.load_model(0), ctx.load_model(1)
        masks = mask_of(model, str(pruned.folder), homes)
        density = summary(masks)["density"]
        if density > 0.999:
            said = f"{density:.1%} of the first model's weights are there, so it is not pruned"
            ctx.note(f"{said}; its blocks only learn to answer like those of the second.", "warning")
        repair = Repair(
            small_set=p.small_set, with_vectors=p.with_vectors, r=p.r, alpha=p.alpha, learning_rate=p.learning_rate,
            steps=p.steps, warmup=p.warmup,
        )  # fmt: skip
        chain = BlockChain(model, ctx.calibration(p.samples))
        found = reconstruct(chain, dense, masks, repair, ctx.generator("order"), ctx.progress)
        write_live(model, pruned, out)
        save_masks(out.folder, {homes[name]: mask for name, mask in masks.items()})
        ctx.report["blocks"] = [one.to_dict() for one in found]
        ctx.report["mask"] = summary({homes[name]: mask for name, mask in masks.items()})
        idle = [one.block for one in found if not one.after < one.before]
        if idle:
            names = ", ".join(idle[:4])
            ctx.note(f"{len(idle)} of {len(found)} blocks got no closer to the dense ones and stayed as they were: {names}.", "warning")  # fmt: skip
