"""Pruning: which weights go, counted exactly even with ties, and the explicit mask that remembers it.

A mask is True where a weight is kept. It is stored on its own and never read off the zeros: a kept weight may be zero too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engine.core.errors import Fault, RecipeError, bad_input
from engine.core.facts import ModelFacts
from engine.core.method import Verdict
from engine.core.params import dial
from engine.io.facts import model_facts
from engine.io.tensors import load_tensors, save_tensors
from engine.parts.blocks import find_blocks

if TYPE_CHECKING:
    from torch import nn

MASK_FILE = "pruning_mask.safetensors"
UNSTRUCTURED = "unstructured"
PatternName = Literal["unstructured", "2:4", "4:8", "1:4"]
PATTERN_HELP = (
    "Where the zeros may be: unstructured (anywhere), or n:m (in every m neighbouring weights of a row exactly n are kept; "
    "2:4 is what newer graphics cards can use for speed)."
)


def sparsity_dial() -> Any:
    """The dial for the share of weights that go."""
    return dial(
        0.5,
        label="Share removed",
        unit="share",
        low=0.0,
        high=0.99,
        tier="basic",
        paper=0.5,
        help="This share of the weights in every layer becomes zero; it counts for the unstructured pattern only, since n:m fixes the share itself.",
    )


def pattern_dial() -> Any:
    """The dial for the pattern of the zeros."""
    return dial(UNSTRUCTURED, label="Pattern", tier="basic", paper=UNSTRUCTURED, help=PATTERN_HELP)


def samples_dial() -> Any:
    """The dial for the number of calibration texts."""
    return dial(
        128,
        label="Texts to look at",
        unit="texts",
        low=1,
        high=4096,
        paper=128,
        help="How many pieces of text are read to see what flows through each layer; each is as long as the longest text allows.",
    )


@dataclass(frozen=True)
class Pattern:
    """Either a share of zeros anywhere, or n kept of every m neighbours along the input axis."""

    sparsity: float
    n: int = 0
    m: int = 0

    @classmethod
    def of(cls, name: str, sparsity: float) -> Pattern:
        """ "unstructured" takes the sparsity; "n:m" has its own, 1 - n / m."""
        if name == UNSTRUCTURED:
            return cls(sparsity)
        found = re.fullmatch(r"(\d+):(\d+)", name)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"'{name}' is no pattern.")
        n, m = int(found[1]), int(found[2])
        return cls(1.0 - n / m, n, m)

    @property
    def structured(self) -> bool:
        return self.m > 0

    def keep(self, score: Tensor, *, per_row: bool = False) -> Tensor:
        """The mask of the largest scores [out, in]; unstructured: over the whole matrix, or in every row alone."""
        if self.structured:
            return keep_n_of_m(score, self.n, self.m)
        return keep_per_row(score, self.sparsity) if per_row else keep_per_tensor(score, self.sparsity)


# ── masks with exact counts ───────────────────────────────────────────────────────────────────────────────────────────


def num_pruned(size: int, sparsity: float) -> int:
    """How many of `size` weights go: the nearest whole number, halves upwards."""
    return int(sparsity * size + 0.5)


def keep_per_tensor(score: Tensor, sparsity: float) -> Tensor:
    """Keep the largest scores of a whole tensor. Of equal scores the earlier ones go first, so that the count is exact."""
    return _keep_rows(score.reshape(1, -1), num_pruned(score.numel(), sparsity)).view(score.shape)


def keep_per_row(score: Tensor, sparsity: float) -> Tensor:
    """Keep the largest scores of every row [out, in]; each row loses the same number."""
    return _keep_rows(score, num_pruned(score.shape[-1], sparsity))


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Keep exactly the n largest scores of every m neighbours along the last axis."""
    if score.shape[-1] % m:
        raise ValueError(f"{score.shape[-1]} inputs are no multiple of {m}.")
    return _keep_rows(score.reshape(-1, m), m - n).view(score.shape)


def _keep_rows(score: Tensor, drop: int) -> Tensor:
    order = torch.sort(score, dim=-1, stable=True).indices  # a threshold would take all ties or none
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order[..., :drop], False)


def wanda_score(weight: Tensor, square_sums: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2, with the sum of squares of every input [in]."""
    return weight.abs() * square_sums.sqrt()


# ── which layers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def prunable(model: ModelFacts) -> dict[str, tuple[int, int]]:
    """Every linear layer inside the repeated blocks, name -> (out, in); embeddings, output layer, poolers and heads stay dense."""
    layout = find_blocks(model.tensors)
    inside = {name for block in layout.blocks for module in block.modules() for name in module.tensors}
    return {name: shape for name, shape in model.linears.items() if f"{name}.weight" in inside}


def prunable_in(folder: Path, tensors: Iterable[str], title: str, pattern: str = UNSTRUCTURED) -> dict[str, str]:
    """The layers of a model folder that may be pruned: name in the loaded model -> name of its weight in the files; refuses what does not fit."""
    model = model_facts(f"folder:{folder}")
    layers = prunable(model)
    names = set(tensors)
    homes = {layer: same_tensor(f"{layer}.weight", names) for layer in layers}
    found = {layer: home for layer, home in homes.items() if home is not None}
    if not found or len(found) < len(layers):
        verdict = prunable_verdict(title, model)
        raise bad_input("model.source", verdict.why or f"The files of {folder.name} name their weights in a way that is not known here.",
                        "Only weights that are known for certain to belong to a block are removed.",
                        verdict.way_out or "Choose a model of another family.", "no_such_layer")  # fmt: skip
    faults = pattern_faults(pattern, layers, "params.pattern")
    if faults:
        raise RecipeError(faults)
    return found


def prunable_verdict(title: str, model: ModelFacts) -> Verdict:
    """Whether the model has blocks with ordinary linear layers in them."""
    if prunable(model):
        return Verdict(True)
    return Verdict(
        False,
        f"{title} zeroes weights of ordinary linear layers inside the blocks of a transformer, and this {model.family} model shows none.",
        "Choose a model of another family, such as Llama, OPT, Qwen or BERT.",
    )


def pattern_faults(name: str, layers: Mapping[str, tuple[int, int]], where: str = "pattern") -> list[Fault]:
    """A fault when the rows of a layer cannot be cut into groups of m."""
    pattern = Pattern.of(name, 0.5)
    odd = [(layer, into) for layer, (_, into) in layers.items() if pattern.structured and into % pattern.m]
    if not odd:
        return []
    layer, into = odd[0]
    return [
        Fault(
            where=where,
            what=f"The pattern {name} does not fit this model.",
            why=f"The layer {layer} has {into:,} inputs, which is no multiple of {pattern.m}"
            + (f"; {len(odd) - 1} more layers are like it." if len(odd) > 1 else "."),
            way_out=_fitting(layers),
            code="odd_width",
        )
    ]


def _fitting(layers: Mapping[str, tuple[int, int]]) -> str:
    fits = [name for name in ("2:4", "4:8") if not any(into % int(name[2:]) for _, into in layers.values())]
    return f"Choose unstructured{' or ' + ' or '.join(fits) if fits else ''}."


# ── the mask as a file ────────────────────────────────────────────────────────────────────────────────────────────────


def pack_bits(mask: Tensor) -> Tensor:
    """A mask as bytes, eight places in one, the first in the highest bit: uint8 [ceil(n / 8)]."""
    flat = mask.reshape(-1).to(torch.uint8).cpu()
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
    return (flat << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The mask of a shape from its bytes."""
    shape = tuple(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (prod(shape) + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes are no mask of the shape {shape}.")
    bits = (packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(-1)[: prod(shape)].view(shape).bool()


def save_masks(folder: Path, masks: Mapping[str, Tensor]) -> None:
    """Write the masks (by tensor name) beside the weights of a model folder; their shapes are those of the weights."""
    packed = {name: pack_bits(mask) for name, mask in masks.items()}
    save_tensors(folder / MASK_FILE, packed, {"meaning": "bit 1 = kept, first place in the highest bit"})


def load_masks(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The masks beside the weights of a model folder for tensors of these shapes; empty when the folder has none.

    Names may differ by the prefix that a head puts before every tensor.
    """
    path = folder / MASK_FILE
    if not path.is_file():
        return {}
    packed = load_tensors(path)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        key = same_tensor(name, packed)
        if key is None:
            continue
        try:
            found[name] = unpack_bits(packed[key], shape)
        except ValueError as error:
            raise bad_input(
                "model.source", f"The file {MASK_FILE} does not belong to this model.", f"For {name}: {error}",
                "Prune the model again, or remove the file to take the zeros of the weights as the mask.", "other_mask",
            ) from error  # fmt: skip
    return found


def same_tensor(name: str, names: Iterable[str]) -> str | None:
    """The name under which a file keeps the live model's tensor `name`, with or without the prefix of the body; None when it does not."""
    names = names if isinstance(names, Mapping | set | frozenset) else set(names)
    if name in names:
        return name
    short = name.partition(".")[2]
    if short in names:
        return short
    longer = [other for other in names if other.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 else None


def mask_of(model: nn.Module, folder: str, layers: Iterable[str]) -> dict[str, Tensor]:
    """The mask of every named layer of a loaded model: from its folder, or else where its weights are not zero, looked at this once."""
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in layers}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    stored = load_masks(Path(folder), shapes) if folder else {}
    masks: dict[str, Tensor] = {}
    for name, weight in weights.items():
        mask = stored[name].to(weight.device) if name in stored else weight.detach() != 0
        if bool((weight.detach()[~mask] != 0).any()):
            raise bad_input(
                "model.source", f"{name} has weights where the file {MASK_FILE} says that they were removed.",
                "The weights were changed after pruning.", "Prune the model again, or remove the file.", "other_mask",
            )  # fmt: skip
        masks[name.removesuffix(".weight")] = mask
    return masks


def summary(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts and densities for a record: of all masked tensors, and of each."""
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    kept, total = sum(one for one, _ in counts.values()), sum(size for _, size in counts.values())
    return {
        "kept": kept,
        "total": total,
        "density": kept / total if total else 1.0,
        "tensors": {
            name: {"kept": one, "total": size, "density": round(one / size, 6)} for name, (one, size) in counts.items()
        },
    }
