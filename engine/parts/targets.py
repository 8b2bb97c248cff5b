"""Which layers a method edits: what a target specification means for a model, read from facts alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from engine.core.errors import EngineError, Fault
from engine.core.facts import Facts, ModelFacts
from engine.core.method import Verdict
from engine.core.params import dial

ALL, ATTENTION, FEED_FORWARD = "all-linear", "attention", "feed-forward"
TARGETS_HELP = (
    "Which layers are edited: all-linear (every layer inside the network), attention (the layers that relate words to each other), "
    "feed-forward (the others), or layer names with commas between them, such as q_proj, v_proj."
)
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def top_blocks_dial(*, low: int = 1) -> Any:
    """The dial "only the top blocks", the same for every method that has it."""
    return dial(
        None,
        label="Only the top blocks",
        unit="blocks",
        low=low,
        high=1024,
        help="Only so many blocks at the top of the model learn, the rest stays as it is: quicker, and the lower part has to run only once for each text. "
        "Empty: all of them.",
    )  # fmt: skip


def above(names: Iterable[str], model: ModelFacts, top_blocks: int | None) -> list[str]:
    """Those of the tensors or modules that belong to the top blocks, or stand behind all blocks; everything for None."""
    if top_blocks is None:
        return list(names)
    lowest = model.num_layers - top_blocks
    order = {name: place for place, name in enumerate(model.tensors)}
    end = max((place for name, place in order.items() if _BLOCK.search(name)), default=-1)
    return [
        name
        for name in names
        if (
            int(found[1]) >= lowest
            if (found := _BLOCK.search(name))
            else order.get(name, order.get(f"{name}.weight", -1)) > end
        )
    ]


def targets(spec: str, model: ModelFacts, top_blocks: int | None = None) -> dict[str, tuple[int, int]]:
    """The layers that `spec` names, in the top blocks, in the order of the model: name -> (out, in). Unknown names match nothing; see `target_faults`."""
    chosen = _named(spec.strip(), model)
    return {name: chosen[name] for name in above(chosen, model, top_blocks)}


def _named(spec: str, model: ModelFacts) -> dict[str, tuple[int, int]]:
    layers = model.linears
    if spec == ALL:
        return dict(layers)
    if spec in {ATTENTION, FEED_FORWARD}:
        return {name: shape for name, shape in layers.items() if bool(_ATTENTION.search(name)) is (spec == ATTENTION)}
    wanted = tuple(_names(spec))
    return {name: shape for name, shape in layers.items() if any(_matches(name, item) for item in wanted)}


def target_faults(
    spec: str, model: ModelFacts, where: str = "targets", *, top_blocks: int | None = None
) -> list[Fault]:
    """A fault for each name that no layer carries, with the nearest one that exists; and one when none of them is in the top blocks."""
    faults = _unknown_names(spec, model, where)
    if not faults and not targets(spec, model, top_blocks):
        faults.append(
            Fault(
                where="top_blocks",
                what=f"None of the chosen layers is in the top {top_blocks} of {model.num_layers} blocks.",
                why="Then nothing would learn.",
                way_out="Choose more blocks, or other layers.",
                code="no_such_layer",
            )
        )
    return faults


def _unknown_names(spec: str, model: ModelFacts, where: str) -> list[Fault]:
    layers = model.linears
    ways = f"Write {ALL}, {ATTENTION} or {FEED_FORWARD}, or names of layers."
    if spec.strip() in {ALL, ATTENTION, FEED_FORWARD}:
        if targets(spec, model):
            return []
        return [
            Fault(
                where=where,
                what=f"This model has no layers of the kind '{spec.strip()}'.",
                why="No layer name says so.",
                way_out=f"Write {ALL}.",
                code="no_such_layer",
            )
        ]
    names = _names(spec)
    if not names:
        return [
            Fault(
                where=where,
                what="No target layer is named.",
                why="Then nothing would learn.",
                way_out=ways,
                code="no_such_layer",
            )
        ]
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    faults = []
    for item in names:
        if any(_matches(name, item) for name in layers):
            continue
        close = difflib.get_close_matches(item, [*leaves, *layers, ALL, ATTENTION, FEED_FORWARD], n=1, cutoff=0.5)
        faults.append(
            Fault(
                where=where,
                what=f"There is no target layer called '{item}'.",
                code="no_such_layer",
                why="No linear layer has this name; embeddings, output layers and new classifiers cannot be targets.",
                way_out=f"Did you mean '{close[0]}'?" if close else f"Choose from {', '.join(leaves)}, or write {ALL}.",
            )
        )
    return faults


def rank_faults(r: int, limits: Iterable[tuple[str, int]], *, noun: str, where: str = "r") -> list[Fault]:
    """A fault when `r` is larger than the smallest of `limits` (layer name, largest legal value)."""
    name, least = min(limits, key=lambda item: item[1], default=("", r))
    if r <= least:
        return []
    return [
        Fault(
            where=where,
            what=f"'{where}' is {r:,}.",
            why=f"The layer {name} has only {least:,} {noun}.",
            way_out=f"Choose {least:,} or less, or leave this layer out of the targets.",
            code="too_large",
        )
    ]


def linear_verdict(title: str, facts: Facts) -> Verdict:
    """Whether the model has layers that can be edited; GPT-2's transposed Conv1D layers are not among them."""
    if facts.model.linears:
        return Verdict(True)
    return Verdict(
        False,
        f"{title} edits ordinary linear layers, and this {facts.model.family} model keeps its weights in another form.",
        "Choose full fine-tuning, or a model of another family, such as Llama or BERT.",
    )


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The live layer behind a name from the facts: a plain nn.Linear that shares its weight with nobody."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if type(module) is not nn.Linear:
        kind = "missing" if module is None else f"a {type(module).__name__}"
        raise EngineError(
            Fault(
                where="methods",
                code="no_such_layer",
                what=f"The layer {name} cannot be edited: it is {kind}.",
                why="The model that was loaded differs from its description, or another method has replaced this layer.",
                way_out="Give the methods different target layers.",
            )
        )
    return module


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the layer called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def short_names(chosen: Iterable[str], model: nn.Module) -> list[str]:
    """Leaf names where they mean exactly the chosen layers, full names otherwise: the way adapters are usually written."""
    names = list(chosen)
    every = [name for name, _ in model.named_modules()]
    short: set[str] = set()
    for name in names:
        leaf = name.rpartition(".")[2]
        alike = {other for other in every if other.rpartition(".")[2] == leaf}
        short.add(leaf if alike <= set(names) else name)
    return sorted(short)


def _names(spec: str) -> list[str]:
    return [item for item in re.split(r"[,\s]+", spec) if item]


def _matches(name: str, item: str) -> bool:
    return name == item or name.endswith("." + item)
