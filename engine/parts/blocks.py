"""Which tensor belongs to which layer and to which job in it, read from names and shapes alone; and how to draw a random half of them.

Known by name: Llama, Mistral, Qwen, Gemma, OPT, Phi, GPT-2, GPT-NeoX, Bloom, BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa, ModernBERT, ViT, T5 and BART,
and everything that spells its layers like one of them.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
Granularity = Literal["category", "layer", "model"]

_ROLES: dict[str, dict[str, str]] = {
    "attention": {
        **dict.fromkeys(("q_proj", "query", "q", "q_lin", "query_proj", "wq", "to_q"), "q"),
        **dict.fromkeys(("k_proj", "key", "k", "k_lin", "key_proj", "wk", "to_k"), "k"),
        **dict.fromkeys(("v_proj", "value", "v", "v_lin", "value_proj", "wv", "to_v"), "v"),
        **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj", "out_lin", "o", "wo", "proj", "to_out"), "o"),
        **dict.fromkeys(("c_attn", "qkv_proj", "query_key_value", "wqkv", "qkv", "in_proj"), "qkv"),
        **dict.fromkeys(("kv_proj", "kv"), "kv"),
    },
    "feed_forward": {
        **dict.fromkeys(("gate_proj", "w1", "wi_0"), "gate"),
        **dict.fromkeys(
            (
                "up_proj",
                "fc1",
                "c_fc",
                "fc_in",
                "lin1",
                "dense_h_to_4h",
                "wi",
                "w3",
                "wi_1",
                "ffn",
                "intermediate.dense",
            ),
            "up",
        ),
        **dict.fromkeys(
            ("down_proj", "fc2", "c_proj", "fc_out", "lin2", "dense_4h_to_h", "wo", "w2", "ffn_output", "output.dense"),
            "down",
        ),
        **dict.fromkeys(("gate_up_proj", "gate_and_up_proj"), "gate_up"),
    },
}
_FUSED = {"qkv", "kv", "gate_up"}
_ATTENTION = re.compile(r"attn|attention")
_CROSS = re.compile(r"cross|encdec|encoder_attn")
_NORM = re.compile(r"norm|(^|\.)ln(_\w+)?$")
_INDEX = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True, kw_only=True)
class Module:
    """The tensors of one module, its weight first and its bias behind it: they are always kept together."""

    name: str  # "model.layers.0.self_attn.q_proj"
    place: str  # the same within its layer: "self_attn.q_proj"
    role: str  # "q", "k", "v", "o", "up", "gate", "down", "norm", "other", or fused: "qkv", "kv", "gate_up"
    tensors: tuple[str, ...]

    @property
    def fused(self) -> bool:
        return self.role in _FUSED


@dataclass(frozen=True, kw_only=True)
class Block:
    """One repeated layer: its attention matrices by role, its feed-forward matrices, its norms, and whatever else it holds."""

    stack: int  # which pile of layers: an encoder-decoder has two
    index: int
    attention: dict[str, Module] = field(default_factory=dict)
    cross_attention: dict[str, Module] = field(default_factory=dict)
    feed_forward: tuple[Module, ...] = ()
    norms: tuple[Module, ...] = ()
    other: tuple[Module, ...] = ()

    def categories(self) -> dict[str, tuple[Module, ...]]:
        """The modules by category, empty categories left out."""
        named = {
            "attention": tuple(self.attention.values()),
            "cross_attention": tuple(self.cross_attention.values()),
            "feed_forward": self.feed_forward,
            "norms": self.norms,
            "other": self.other,
        }
        return {name: modules for name, modules in named.items() if modules}

    def modules(self) -> tuple[Module, ...]:
        return tuple(module for modules in self.categories().values() for module in modules)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model as piles of layers, and the tensors outside of them: embeddings, final norm, head."""

    blocks: tuple[Block, ...]
    outside: tuple[str, ...]

    @property
    def fused(self) -> tuple[Module, ...]:
        """Modules whose one matrix does the work of several."""
        return tuple(module for block in self.blocks for module in block.modules() if module.fused)


def find_blocks(tensors: Shapes) -> Layout:
    """Sort tensors, given by name and shape, into layers. Only piles of layers that hold attention count; the rest lies outside."""
    return _layout(tuple((name, tuple(shape)) for name, shape in tensors.items()))


@functools.lru_cache(maxsize=32)  # a check of one recipe asks a dozen times about the same model
def _layout(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Layout:
    tensors = dict(shapes)
    piles: dict[str, dict[int, dict[str, list[str]]]] = {}
    outside: list[str] = []
    for name in tensors:
        found = _INDEX.match(name)
        if found is None:
            outside.append(name)
            continue
        place = _module_of(found["rest"])
        piles.setdefault(found["stack"], {}).setdefault(int(found["index"]), {}).setdefault(place, []).append(name)
    blocks: list[Block] = []
    num_stacks = 0
    for stack, layers in piles.items():
        pile = [_block(stack, num_stacks, index, modules, tensors) for index, modules in sorted(layers.items())]
        if any(block.attention for block in pile):
            blocks += pile
            num_stacks += 1
        else:
            outside += [name for modules in layers.values() for names in modules.values() for name in names]
    return Layout(blocks=tuple(blocks), outside=tuple(sorted(outside)))


def blocks_of(model: nn.Module) -> Layout:
    """The same for a live model."""
    return find_blocks({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


def _module_of(rest: str) -> str:
    """The module that a tensor belongs to: "mlp.fc1.bias" and "mlp.fc1.weight" share one, as "in_proj_bias" and "in_proj_weight" do."""
    return re.sub(r"[._](weight|bias|gamma|beta)$", "", rest)  # gamma and beta: norms in old BERT files


def _block(prefix: str, stack: int, index: int, modules: dict[str, list[str]], tensors: Shapes) -> Block:
    attention: dict[str, Module] = {}
    cross: dict[str, Module] = {}
    kept: dict[str, list[Module]] = {"feed_forward": [], "norms": [], "other": []}
    for place, names in modules.items():
        ordered = tuple(sorted(names, key=lambda name: (name.endswith(("bias", "beta")), name)))
        category, role = _category(place, len(tensors[ordered[0]]))
        module = Module(name=f"{prefix}.{index}.{place}".lstrip("."), place=place, role=role, tensors=ordered)
        home = cross if category == "cross_attention" else attention
        if category in kept:
            kept[category].append(module)
        elif role in home:  # two of one kind, which no family we know has: drawn among the rest, never lost
            kept["other"].append(module)
        else:
            home[role] = module
    forward = tuple(_with_fused_gate(kept["feed_forward"], tensors))
    return Block(
        stack=stack,
        index=index,
        attention=attention,
        cross_attention=cross,
        feed_forward=forward,
        norms=tuple(kept["norms"]),
        other=tuple(kept["other"]),
    )


def _category(place: str, dim: int) -> tuple[str, str]:
    """Category and role of a module from its path within the layer and the dimensions of its weight."""
    path = place.lower()
    parts = path.split(".")
    if _NORM.search(parts[-1]):
        return "norms", "norm"
    if dim < 2:
        return "other", "other"
    endings = (".".join(parts[-2:]), parts[-1])
    category = "attention" if _ATTENTION.search(path) else "feed_forward"
    role = next((_ROLES[category][ending] for ending in endings if ending in _ROLES[category]), "")
    if not role:
        return "other", "other"
    return ("cross_attention" if category == "attention" and _CROSS.search(path) else category), role


def _with_fused_gate(modules: Sequence[Module], tensors: Shapes) -> Iterable[Module]:
    """Recognise a gate hidden in the up matrix: both matrices of a plain pair have one size, a gated up matrix is twice the down matrix."""
    size = {module.name: prod(tensors[module.tensors[0]]) for module in modules}
    down = next((size[module.name] for module in modules if module.role == "down"), 0)
    for module in modules:
        hidden = len(modules) == 2 and module.role == "up" and size[module.name] == 2 * down
        yield replace(module, role="gate_up") if hidden else module


# ── a random half ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Half:
    """A draw over the modules of a model: which tensors of the layers were chosen, and which were left out."""

    chosen: frozenset[str]
    left: frozenset[str]

    def ratios(self, layout: Layout, tensors: Shapes) -> dict[str, dict[str, float]]:
        """The true share that was chosen, by number of modules and by number of parameters, of all layers and of each category."""
        counts: dict[str, list[int]] = {}
        for block in layout.blocks:
            for category, modules in block.categories().items():
                for module in modules:
                    size = sum(prod(tensors[name]) for name in module.tensors)
                    taken = module.tensors[0] in self.chosen
                    for key in ("all", category):
                        have = counts.setdefault(key, [0, 0, 0, 0])
                        have[0] += taken
                        have[1] += 1
                        have[2] += size * taken
                        have[3] += size
        return {key: {"count": have[0] / have[1], "parameters": have[2] / have[3]} for key, have in counts.items()}


def draw_half(layout: Layout, *, seed: int, round_number: int, ratio: float, granularity: Granularity) -> Half:
    """Choose a share of the modules in all layers. The same (seed, round) gives the same draw, on every machine and for every naming prefix.

    category: in every layer the same number of attention matrices, feed-forward matrices and norms. Where the share is no whole number
    (1.5 of 3), some layers get one more, so that the sum is exact.  layer: whole layers.  model: any of all modules.
    """
    key = f"{seed}/{round_number}"
    chosen: set[str] = set()
    if granularity == "layer":
        for stack in sorted({block.stack for block in layout.blocks}):
            pile = [block for block in layout.blocks if block.stack == stack]
            for block in _ranked(pile, f"{key}/layers")[: _share(ratio, len(pile))]:
                chosen.update(name for module in block.modules() for name in module.tensors)
    elif granularity == "model":
        everything = [(block, module) for block in layout.blocks for module in block.modules()]
        everything.sort(key=lambda pair: _rank(f"{key}/model", pair[0], pair[1].place))
        chosen.update(name for _, module in everything[: _share(ratio, len(everything))] for name in module.tensors)
    else:
        chosen.update(_draw_by_category(layout, key, ratio))
    everywhere = {name for block in layout.blocks for module in block.modules() for name in module.tensors}
    return Half(chosen=frozenset(chosen), left=frozenset(everywhere - chosen))


def _draw_by_category(layout: Layout, key: str, ratio: float) -> Iterable[str]:
    groups: dict[tuple[int, str, int], list[tuple[Block, tuple[Module, ...]]]] = {}
    for block in layout.blocks:
        for category, modules in block.categories().items():
            groups.setdefault((block.stack, category, len(modules)), []).append((block, modules))
    for (_, category, size), layers in groups.items():
        total = _share(ratio, size * len(layers))
        least, extra = divmod(total, len(layers))
        generous = {block.index for block in _ranked([block for block, _ in layers], f"{key}/{category}")[:extra]}
        for block, modules in layers:
            ranked = sorted(modules, key=lambda module: _rank(f"{key}/{category}", block, module.place))
            for module in ranked[: least + (block.index in generous)]:
                yield from module.tensors


def _share(ratio: float, count: int) -> int:
    return int(ratio * count + 0.5)


def _ranked(blocks: Sequence[Block], key: str) -> list[Block]:
    return sorted(blocks, key=lambda block: _rank(key, block, ""))


def _rank(key: str, block: Block, place: str) -> bytes:
    """A random place in the order: a hash, so that it depends on no library, no listing order and no naming prefix."""
    return hashlib.sha256(f"{key}/{block.stack}/{block.index}/{place}".encode()).digest()
