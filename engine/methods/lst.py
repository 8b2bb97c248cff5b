"""LST: a narrow network beside the model listens to every layer and learns; nothing flows back through the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.blocks import find_blocks
from engine.parts.ladder import Gate, Output
from engine.parts.side_network import PATTERNS, USUAL, Init, SideNetwork, anatomy_of, kept_layers, usual_k
from engine.train.parts import PartContext

FAMILIES = ("bert", "roberta", "xlm-roberta", "llama", "mistral", "qwen2", "qwen3")  # their blocks can be built narrow


class LST(TrainMethod):
    """Ladder side-tuning."""

    card = Card(
        slug="lst",
        title="Ladder side network (LST)",
        pick_when="Pick this when the model is so big that even LoRA runs out of memory while it learns: a small separate network listens to the big "
        "one and learns, and the big one is only read, never trained through.",
        summary="Beside the model stands a narrow copy of it, cut out of the model itself. Every layer of the model passes what it sees down to the "
        "narrow network, as over the rungs of a ladder, and only the narrow network learns. Nothing has to be remembered inside the big model, "
        "so learning needs little more memory than reading does. The result is a small file that works together with the untouched model.",
        paper="LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
        year=2022,
        arxiv="2206.06522",
        algorithm=(
            "Run the frozen model (N layers, width d) without autograd and in eval mode; hear h_0 (embeddings) and the output h_i of every layer.",
            "Side input: s = Linear_0(h_0), from d to d' = d / k.",
            "At every kept layer i: mu_i = sigmoid(alpha_i / T), starting at one half; u = mu_i s + (1 - mu_i) Linear_i(h_i); s = SideBlock_i(u).",
            "A side block is an ordinary block of the model's own kind with every width divided by k: as many heads (and key-value heads), each k "
            "times smaller; it sees the same mask and the same positions.",
            "At the end: side norm, dropout, Linear_up from d' to d, added to the model's last state; then the model's own head, frozen (a new "
            "classifier learns). Linear_up starts at zero, so the start equals the model. The paper replaces the last state instead: a choice.",
            "Start of the side blocks: score rows and columns by summed squared gradients (Fisher) or by the size of the weights; matrices that share "
            "a dimension vote together, as a sum of logarithms; keep the best 1 / k and copy them.",
            "One set of residual dimensions, chosen from the embedding, holds for all blocks and norms; kept rows of one matrix are kept columns of "
            "the next; each head keeps its share; rotary positions keep whole pairs with their own frequencies. With k = 1 the copy is exact.",
            "Learn samplers, gates, side blocks, side norm and up-projection. Backward touches the side network and the head, nothing else.",
            "Answer: the model and the side network together; both write into one key-value cache, side layers behind those of the model.",
        ),
        avoid_when="Answers must be as quick as those of the plain model, or the result must become one ordinary model file: a side network cannot be "
        "folded in. When memory is no problem, LoRA usually learns a little better.",
        traps=(
            "If anything inside the model learns, autograd keeps the whole model and the saving is gone. Here the model runs without autograd, and "
            "other methods that want to learn inside it are refused.",
            "The model's own dropout would be noise that the side network cannot counter: the model stays in eval mode while the side network trains.",
            "The states h_i are kept for the samplers: N x batch x length x d numbers. Leaving out layers makes that smaller.",
            "A start cut from the model must keep the same residual dimensions everywhere, or it is a scrambled network; released code chooses them "
            "anew in some variants, and cuts across heads. Here it is one choice, head by head.",
            "The Fisher start runs a backward pass through the model, for single examples and before training: its gradients are summed up and "
            "forgotten matrix by matrix, but if even one example does not fit, choose the start 'weight'.",
            "Released code draws the samplers at random; then the cut blocks do not find the coordinates that they were cut for. Here the samplers "
            "start by picking the kept dimensions; random is a choice.",
            "With an output other than 'add', the step-0 model differs from the base model, and a new side network answers worse than the base.",
            "Time falls less than memory: the model is still read at every step. Generating costs a second, narrow pass and about 1 / k more cache.",
            "A cache filled by the plain model cannot be continued: the side network would have no past. It is refused.",
            "Widths must divide by k, and with rotary positions a narrow head must keep an even size.",
        ),
        figures=(
            Figure(
                claim="Training memory against full fine-tuning, similar share of parameters",
                paper="-69 % (abstract)",
                ours="-80 % of what is remembered for backward (Llama, 12 layers of width 128, k = 8)",
            ),
            Figure(
                claim="The same for LoRA or adapters",
                paper="-26 % (abstract)",
                ours="-9 %; so LST remembers 0.22 of what LoRA does, and 0.24 on MiniLM",
            ),
            Figure(
                claim="Share of numbers that learn",
                paper="1 to 2 % (unconfirmed)",
                ours="1.4 % of MiniLM with its classifier; 2.8 % of the blocks of the 12-layer Llama",
            ),
            Figure(claim="T5-base memory: full, adapters or LoRA, LST", paper="17.6, about 13, 5.5 GB (unconfirmed)"),
            Figure(
                claim="Quality against LoRA",
                paper="GLUE, T5-base: a little below when memory is free, above when it is short (unconfirmed)",
                ours="right or wrong grammar, MiniLM: 0.816, LoRA 0.869, linear probe 0.620: 79 % of LoRA's gain (2 seeds)",
            ),
            Figure(
                claim="The rungs: every layer against the last state alone",
                paper="rungs help (unconfirmed)",
                ours="0.816 against 0.621, the same task",
            ),
            Figure(
                claim="Start by Fisher pruning against a random start",
                paper="better (unconfirmed)",
                ours="held-out loss after 100 steps 3.47 against 3.59 (stories model on Shakespeare; by weights 3.51)",
            ),
        ),
        cost=Cost(time=2, memory=1, size=2),
        family="Architecture",
    )
    slots = (Slot.PARAMETRIZATION,)
    presets = {
        "tiny": {"k": 4, "samples": 8},
        "paper": {"k": 8, "output": "side", "samplers": "random", "samples": 1024, "layers": "3-of-4", "dropout": 0.1},
    }
    cannot = {
        "merge": "The side network is a second network that reads every layer; no weight of the model could stand for it."
    }

    class Params(HyperParams):
        """Hyperparameters of LST."""

        k: int | None = dial(
            None,
            label="How many times narrower",
            unit="times",
            low=1,
            high=64,
            tier="basic",
            paper=8,
            suggested="8, or the largest number below it that the model's heads can be divided by.",
            help="The side network is this many times narrower than the model: larger is lighter, smaller can learn more.",
        )
        layers: str = dial(
            "all",
            label="Layers with a rung",
            tier="basic",
            paper="3-of-4",
            help="all, 3-of-4 (leaves out the first of every four), every-2nd, or numbers counted from 0, such as 1, 3, 5: fewer are lighter.",
        )
        init: Init = dial(
            "fisher",
            label="Starting point",
            paper="fisher",
            help="fisher cuts the side network out of the model where your task pulls most, weight where the weights are largest, random draws it.",
        )
        samples: int = dial(
            64,
            label="Examples for the start",
            unit="examples",
            low=1,
            high=1024,
            paper=1024,
            help="So many examples are read once, forward and backward, for the starting point 'fisher' (at most eight batches).",
        )
        samplers: Literal["pick", "random"] = dial(
            "pick",
            label="Start of the rungs",
            paper="random",
            help="pick: a rung first passes on exactly the kept dimensions of the model; random: any mixture.",
        )
        output: Output = dial(
            "add",
            label="What goes into the head",
            paper="side",
            help="add: the model's last state plus what the side network says, so the start equals the model; side: the side network alone; "
            "gate: a learned mixture of both.",
        )
        ladders: Literal["all", "last"] = dial(
            "all",
            label="What the side network hears",
            paper="all",
            help="all: every kept layer of the model; last: the last layer alone, a comparison that shows what the rungs are worth.",
        )
        gate: Gate = dial(
            "learnable",
            label="Gates",
            paper="learnable",
            help="learnable: how much each rung counts is learned; none: what it brings is added.",
        )
        alpha: float = dial(
            0.0,
            label="Start of the gates",
            unit="1",
            low=-1.0,
            high=1.0,
            paper=0.0,
            help="0 starts with half of the side network and half of the rung; larger listens less to the model.",
        )
        temperature: float = dial(
            0.1,
            label="Softness of the gates",
            unit="1",
            low=0.01,
            high=10.0,
            paper=0.1,
            help="Smaller lets the gates open and close more quickly.",
        )
        dropout: float = dial(
            0.1,
            label="Dropout",
            unit="share",
            low=0.0,
            high=0.9,
            paper=0.1,
            help="This share of the side network's last state is left out at random while learning, against memorising.",
        )
        bias: bool = dial(
            True,
            label="Offsets in the rungs",
            paper=True,
            help="Rungs and the way back up have an offset besides their matrix.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        model = facts.model
        if model.family not in FAMILIES:
            return Verdict(
                False,
                f"A narrow copy of the blocks of a {model.family} model cannot be built here.",
                f"Choose a model of the family {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}, or LoRA.",
            )
        return super().supports(facts)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        wide, count = anatomy_of(facts.model), facts.model.num_layers
        faults = []
        if params.k is not None and not wide.fits(params.k):
            even = " and an even number must be left, because positions turn pairs of numbers" if wide.rotary else ""
            faults.append(
                Fault(
                    where="k",
                    code="does_not_divide",
                    what=f"A side network {params.k} times narrower does not fit this model.",
                    why=f"Its width {wide.hidden} and the size {wide.head_dim} of its heads must be divisible by that number{even}.",
                    way_out=f"Choose one of: {', '.join(map(str, wide.legal()))}.",
                )
            )
        kept = kept_layers(params.layers, count)
        words = [item for item in re.split(r"[,\s]+", params.layers) if item and not item.isdecimal()]
        if params.layers not in PATTERNS and (words or not kept or kept[-1] >= count):
            wrong = (
                f"'{words[0]}' is no layer" if words else f"there is no layer {kept[-1]}" if kept else "none is named"
            )
            faults.append(
                Fault(
                    where="layers",
                    code="no_such_layer",
                    what=f"The layers '{params.layers}' cannot be used: {wrong}.",
                    why=f"This model has {count} layers, counted from 0 to {count - 1}.",
                    way_out=f"Write {', '.join(PATTERNS)}, or numbers with commas between them.",
                )
            )
        elif not kept:
            faults.append(
                Fault(
                    where="layers",
                    code="no_such_layer",
                    what=f"With '{params.layers}' no layer is left.",
                    why=f"This model has only {count}.",
                    way_out="Write all.",
                )
            )
        return faults

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        """Every weight of the model: none changes, and none may be changed by another method, because no gradient would reach it."""
        return frozenset(facts.model.tensors)

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        wide = anatomy_of(facts.model)
        k = params.k or usual_k(wide)
        kept = kept_layers(params.layers, facts.model.num_layers)
        blocks = find_blocks(facts.model.tensors).blocks
        inside = sum(
            prod(max(1, size // k) for size in facts.model.tensors[name])
            for layer in kept
            for module in blocks[layer].modules()
            for name in module.tensors
        )
        narrow, rungs = wide.hidden // k, len(kept) if params.ladders == "all" else 0
        samplers = (rungs + 1) * narrow * (wide.hidden + params.bias) + wide.hidden * (narrow + params.bias)
        gates = (rungs if params.gate == "learnable" else 0) + (params.output == "gate")
        norm = narrow * (1 if wide.rotary else 2)
        return inside + samplers + gates + norm

    @classmethod
    def backward_share(cls, params: Any, facts: Facts) -> float:
        """The side network alone, 1 / k of the width, and one state a rung of the 34 or so that a layer remembers."""
        kept = len(kept_layers(params.layers, facts.model.num_layers)) / max(1, facts.model.num_layers)
        return min(1.0, kept * (1 / (params.k or usual_k(anatomy_of(facts.model))) + 1 / 34))

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        index = next((place for place, ref in enumerate(recipe.methods) if ref.slug == cls.card.slug), 0)
        wide = anatomy_of(facts.model)
        k = usual_k(wide)
        rate, why = 3e-3, "Only a small network learns, and it takes large steps well: the paper's rate."
        if facts.model.kind == "encoder":
            rate, why = (
                1e-3,
                "The blocks of an encoder are normed after they are added up and become unsteady at the paper's 0.003.",
            )
        elif facts.model.num_parameters < 2_000_000:
            rate, why = 1e-2, "Only a small network learns, and beside a tiny model it takes very large steps well."
        return [
            Suggestion(
                where=f"methods[{index}].params.k",
                value=k,
                reason="The paper's number."
                if k == USUAL
                else f"The heads of this model have {wide.head_dim} numbers each; {k} is the largest number up to {USUAL} that divides them.",
            ),
            Suggestion(where="settings.learning_rate", value=rate, reason=why),
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [SideNetwork(ctx, self.params)]
