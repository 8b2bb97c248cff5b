"""Cutting narrow blocks out of wide ones: which dimensions of a transformer matter most, and copies that keep only those.

One set of dimensions of the residual stream is chosen for the whole network; inside a block the kept rows of one matrix are the kept columns of the
next. So the narrow network is a connected part of the wide one, and with k = 1 it is the wide one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.parts.blocks import Block

_TINY = 1e-30  # a dimension that never got a gradient ranks last, and its logarithm stays finite


@dataclass(frozen=True)
class Anatomy:
    """The sizes of a transformer block, wide or narrow."""

    hidden: int
    inner: int  # width of the feed-forward layer
    heads: int
    kv_heads: int
    head_dim: int
    rotary: bool

    def narrowed(self, k: int) -> Anatomy:
        """The same block with every width divided by k; heads and their grouping stay."""
        return Anatomy(self.hidden // k, self.inner // k, self.heads, self.kv_heads, self.head_dim // k, self.rotary)

    def fits(self, k: int) -> bool:
        """Whether widths divide by k; rotary positions turn pairs of numbers, so heads keep an even size."""
        whole = self.hidden % k == 0 and self.head_dim % k == 0 and self.inner >= k
        return whole and (not self.rotary or self.head_dim // k % 2 == 0)

    def legal(self, highest: int = 64) -> list[int]:
        """Every k that fits."""
        return [k for k in range(1, highest + 1) if self.fits(k)]


def anatomy(config: Any) -> Anatomy:
    """Read the sizes from a transformers configuration."""
    heads = int(config.num_attention_heads)
    return Anatomy(
        hidden=int(config.hidden_size),
        inner=int(config.intermediate_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        rotary=getattr(config, "rope_parameters", None) is not None,
    )


# ── how much each row and column of a matrix matters ──────────────────────────────────────────────────────────────────


@dataclass
class Scores:
    """The L1 score of every row and column of every matrix: sums of |w|, or of squared gradients (the diagonal Fisher information)."""

    rows: dict[str, Tensor] = field(default_factory=dict)  # name -> [out]
    columns: dict[str, Tensor] = field(default_factory=dict)  # name -> [in]

    def add(self, name: str, importance: Tensor) -> None:
        """Count the importance [out, in] of every weight of a matrix."""
        for sums, dim in ((self.rows, 1), (self.columns, 0)):
            new = importance.sum(dim, dtype=torch.float64).cpu()
            sums[name] = sums[name] + new if name in sums else new


def weight_scores(matrices: Mapping[str, nn.Parameter]) -> Scores:
    """Importance is the size of a weight."""
    scores = Scores()
    for name, matrix in matrices.items():
        scores.add(name, matrix.detach().abs())
    return scores


def fisher_scores(
    model: nn.Module, matrices: Mapping[str, nn.Parameter], losses: Iterable[Callable[[], Tensor]]
) -> Scores:
    """Importance is the sum of squared gradients over samples; `losses` gives one loss a sample.

    A gradient is reduced to row and column sums the moment it is complete and then forgotten, so no second copy of the model is ever held. The model
    is left as it was: mode, flags, no gradients.
    """
    scores = Scores()
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        for name, matrix in matrices.items():
            matrix.requires_grad_(True)
            handles.append(matrix.register_post_accumulate_grad_hook(_counting(scores, name)))
        with torch.enable_grad():
            for loss in losses:
                loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
    return scores


def _counting(scores: Scores, name: str) -> Callable[[Tensor], None]:
    def count(parameter: Tensor) -> None:
        assert parameter.grad is not None
        scores.add(name, parameter.grad.square())
        parameter.grad = None

    return count


# ── which dimensions stay ─────────────────────────────────────────────────────────────────────────────────────────────


def keep_residual(scores: Tensor, wide: Anatomy, k: int) -> Tensor:
    """The dimensions [hidden / k] of the residual stream that stay, from the column scores [hidden] of the embedding; in their order."""
    return _largest(scores, wide.hidden // k)


@dataclass(frozen=True)
class Kept:
    """What stays of one block: index tensors into rows and columns."""

    residual: Tensor  # [hidden / k]
    queries: Tensor  # [heads * head_dim / k], rows of q
    keys: Tensor  # [kv_heads * head_dim / k], rows of k
    values: Tensor  # [kv_heads * head_dim / k], rows of v
    mixed: Tensor  # [heads * head_dim / k], columns of o
    inner: Tensor  # [inner / k], rows of gate and up, columns of down
    rotary: Tensor  # [head_dim / k], places within a head that stay; for blocks without rotary positions the first ones


def keep_block(block: Block, scores: Scores, residual: Tensor, wide: Anatomy, k: int) -> Kept:
    """Choose what stays of a block. Matrices that share a dimension vote together: the product of their scores, taken as a sum of logarithms."""
    small, size = wide.head_dim // k, wide.head_dim
    per_group = wide.heads // wide.kv_heads
    role = {name: module.tensors[0] for name, module in block.attention.items()}
    by_query = scores.rows[role["q"]].view(wide.kv_heads, per_group, size)  # heads of one group share a key head
    by_key = scores.rows[role["k"]].view(wide.kv_heads, size)
    by_value = scores.rows[role["v"]].view(wide.kv_heads, size)
    by_mixed = scores.columns[role["o"]].view(wide.kv_heads, per_group, size)
    if wide.rotary:  # cosines and sines are the same for all heads, so all heads of a block keep the same pairs
        vote = _log(by_query.sum((0, 1))) + _log(by_key.sum(0))  # [head_dim]
        pairs = _largest(vote.view(2, size // 2).sum(0), small // 2)
        places = torch.cat([pairs, pairs + size // 2])  # the partner of place j is j + head_dim / 2
        dots = places.expand(wide.kv_heads, small)
    else:
        vote = _log(by_query.sum(1)) + _log(by_key)  # [kv_heads, head_dim]
        places, dots = torch.arange(small), torch.stack([_largest(row, small) for row in vote])
    vote = _log(by_value) + _log(by_mixed.sum(1))
    carried = torch.stack([_largest(row, small) for row in vote])  # [kv_heads, head_dim / k]
    vote = torch.zeros(wide.inner, dtype=torch.float64)
    for module in block.feed_forward:
        name = module.tensors[0]
        vote = vote + _log(scores.columns[name] if module.role == "down" else scores.rows[name])
    return Kept(
        residual=residual,
        queries=_rows(dots, size, per_group),
        keys=_rows(dots, size, 1),
        values=_rows(carried, size, 1),
        mixed=_rows(carried, size, per_group),
        inner=_largest(vote, wide.inner // k),
        rotary=places,
    )


def even_places(wide: Anatomy, k: int) -> Tensor:
    """Every k-th rotary pair: exactly the frequencies that a head of size head_dim / k has by itself."""
    if not wide.rotary:
        return torch.arange(wide.head_dim // k)
    pairs = torch.arange(0, wide.head_dim // 2, k)
    return torch.cat([pairs, pairs + wide.head_dim // 2])


def _rows(places: Tensor, size: int, repeats: int) -> Tensor:
    """Places within each key head [kv_heads, small] as rows of a matrix whose heads lie behind each other, each group `repeats` heads."""
    spread = places.repeat_interleave(repeats, 0)  # [heads, small]
    return (spread + torch.arange(len(spread))[:, None] * size).flatten()


def _largest(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores, in ascending order; between equals the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def _log(scores: Tensor) -> Tensor:
    return scores.double().clamp(min=_TINY).log()


# ── copies ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def copy_kept(wide_block: nn.Module, narrow_block: nn.Module, block: Block, kept: Kept, wide: Anatomy) -> None:
    """Write the kept rows and columns of every tensor of a wide block into a narrow one."""
    source = dict(wide_block.named_parameters())
    target = dict(narrow_block.named_parameters())
    if source.keys() != target.keys():
        raise ValueError(f"The narrow block differs from the wide one: {sorted(source.keys() ^ target.keys())[:4]}.")
    cuts: dict[str, tuple[Tensor, Tensor]] = {
        "q": (kept.queries, kept.residual),
        "k": (kept.keys, kept.residual),
        "v": (kept.values, kept.residual),
        "o": (kept.residual, kept.mixed),
        "gate": (kept.inner, kept.residual),
        "up": (kept.inner, kept.residual),
        "down": (kept.residual, kept.inner),
    }
    done: set[str] = set()
    for module in block.modules():
        for name in module.tensors:
            own = module.place + name.removeprefix(module.name)
            tensor = source[own]
            if module.role == "norm":
                rows = kept.residual if tensor.shape[0] == wide.hidden else kept.rotary  # Qwen 3 norms every head
                cut = tensor[rows.to(tensor.device)]
            else:
                rows, columns = (index.to(tensor.device) for index in cuts[module.role])
                cut = tensor[rows] if tensor.dim() == 1 else tensor[rows][:, columns]
            target[own].copy_(cut)
            done.add(own)
    if done != target.keys():
        raise ValueError(f"Nothing is known about {sorted(target.keys() - done)[:4]}, so it cannot be cut.")


@torch.no_grad()
def draw(module: nn.Module, spread: float, generator: torch.Generator) -> None:
    """A random start: matrices normal, scales one, offsets zero."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.copy_(torch.normal(0.0, spread, parameter.shape, generator=generator))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
