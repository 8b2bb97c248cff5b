"""Half-Reset: put a random half of a fine-tuned model's matrices back to what they were before, without any training (arXiv 2404.18466, pilot)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from engine.core.errors import bad_input
from engine.core.method import Card, Cost, Figure, TransformMethod
from engine.core.params import HyperParams, dial
from engine.parts.blocks import Granularity, Layout, draw_half, find_blocks

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext

Key = tuple[int, int, str, str]  # stack, layer, place in the layer, "weight" or "bias"
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # norms in old BERT files


class HalfReset(TransformMethod):
    """theta = M * theta_tuned + (1 - M) * theta_base, M constant over each matrix."""

    num_models = (2, 2)
    presets = {"tiny": {}, "paper": {"granularity": "category", "ratio": 0.5}}
    card = Card(
        slug="half-reset",
        title="Half-Reset",
        pick_when="Pick this when a model has already been fine-tuned, has forgotten too much, and you still have the model it was made from: it "
        "brings back half of the old weights in seconds, without training.",
        summary="In every layer a random half of the large tables of numbers is put back to the values they had before fine-tuning; the other half "
        "keeps what was learned. Word table and output layer stay as fine-tuned. Old knowledge partly returns and the new skill partly stays: expect "
        "something in between the two models.",
        paper="HFT: Half Fine-Tuning for Large Language Models",
        year=2024,
        arxiv="2404.18466",
        family="Transforms",
        algorithm=(
            "Inputs: first the fine-tuned model folder, second the folder of the model it was made from.",
            "Draw a mask exactly as half fine-tuning does: in every layer half of the attention matrices, half of the feed-forward matrices, half of the norms.",
            "Drawn matrices (with their biases) keep the fine-tuned values; the others are copied from the base. Everything outside the layers stays fine-tuned.",
            "Tensors are read and written one by one.",
        ),
        avoid_when="You can still train: half fine-tuning reaches more with the same idea. It is of no use when the two models have different shapes.",
        traps=(
            "Matrices that were trained together are torn apart, so a little of both skills is lost; another seed can be clearly better or worse.",
            "The base must be exactly the model that fine-tuning started from.",
        ),
        figures=(
            Figure(
                claim="Llama-2 chat with half of it reset",
                paper="knowledge recovers and chat skill mostly stays (numbers unconfirmed)",
            ),
        ),
        cost=Cost(time=1, memory=1, size=5),
    )

    class Params(HyperParams):
        """How the half is drawn."""

        ratio: float = dial(
            0.5,
            label="Share that stays fine-tuned",
            unit="share",
            low=0.0,
            high=1.0,
            tier="basic",
            help="The share of each layer's matrices that keeps what was learned; the rest goes back to the old model.",
        )
        granularity: Literal["auto", "category", "layer", "model"] = dial(
            "auto",
            label="How the half is drawn",
            paper="category",
            help="'category' draws in every layer and every kind of matrix, 'layer' draws whole layers, 'model' draws from all matrices at once.",
        )
        mask_seed: int = dial(
            17, label="Seed of the draw", unit="1", low=0, high=2**31 - 1, help="Another seed draws another half."
        )

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write the mixture of two model folders of one shape; refuses folders that do not belong together."""
        if len(inputs) != 2:
            raise bad_input(
                "sources",
                f"Half-Reset needs two models and was given {len(inputs)}.",
                "It mixes a fine-tuned model with the one it was made from.",
                "Give the fine-tuned model first and its base second.",
                "wrong_number",
            )
        tuned, base = inputs
        layout = find_blocks(tuned.shapes)
        granularity = self._granularity(layout, tuned.where)
        half = draw_half(
            layout, seed=self.params.mask_seed, round_number=1, ratio=self.params.ratio, granularity=granularity
        )
        origin = _origins(layout, tuned, base)
        with out.weights(tuned.layout) as writer:
            for name in writer.order:
                tensor = tuned[name] if name not in half.left else base[origin[name]].to(tuned.layout[name][0])
                writer.put(name, tensor)
        ctx.report.update(granularity=granularity, kept=half.ratios(layout, tuned.shapes), reset=sorted(half.left))

    def _granularity(self, layout: Layout, where: str) -> Granularity:
        if not layout.blocks:
            raise bad_input(
                where,
                "No layers with attention were found in this model.",
                "Half-Reset draws its half from the layers of a transformer.",
                "Choose a transformer model.",
                "no_layers",
            )
        wanted: Literal["auto", "category", "layer", "model"] = self.params.granularity
        if wanted == "category" and layout.fused:
            raise bad_input(
                "params.granularity",
                f"This model keeps several matrices in one: {layout.fused[0].name}.",
                "Half of every kind cannot be drawn there.",
                "Choose 'layer', or leave it on 'auto'.",
                "fused_matrices",
            )
        if wanted == "auto":
            return "layer" if layout.fused else "category"
        return wanted


def _origins(layout: Layout, tuned: ModelFolder, base: ModelFolder) -> dict[str, str]:
    """For every tensor of the tuned layers, its name in the base. Layers are matched by place, since a head may put a prefix before every name."""
    theirs, ours = _by_place(find_blocks(base.shapes)), _by_place(layout)
    for key in sorted(theirs.keys() | ours.keys()):
        name, other = ours.get(key), theirs.get(key)
        if name is None or other is None:
            problem = f"{name or other} is only in {tuned.folder.name if other is None else base.folder.name}"
        elif base.shapes[other] != tuned.shapes[name]:
            problem = f"{name} has the shape {tuned.shapes[name]} in one and {base.shapes[other]} in the other"
        else:
            continue
        raise bad_input(
            base.where,
            f"These two models do not belong together: {problem}.",
            "Half-Reset puts weights back to where they came from, so both models need the same layers.",
            "Choose the model that the fine-tuned one was made from.",
            "shapes_differ",
        )
    return {name: theirs[key] for key, name in ours.items()}


def _by_place(layout: Layout) -> dict[Key, str]:
    return {
        (block.stack, block.index, module.place, _OLD_NAMES.get(end := name.rpartition(module.place)[2], end)): name
        for block in layout.blocks
        for module in block.modules()
        for name in module.tensors
    }
