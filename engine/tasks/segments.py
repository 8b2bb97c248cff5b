"""Attention when several examples share one row: each attends within itself, so that no mask is built and no place is padding.

A packed batch is one row [1, N] of all its examples, one behind another. Where a mask would stand it carries the lengths of the examples, int64 [1, 1, 1, n]:
transformers hands a mask of four dimensions to every layer as it is. `attend` stands in for transformers' "sdpa" attention and splits the row there; whatever
comes with another mask, or with none, goes the ordinary way.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attended = tuple[Tensor, Tensor | None]


def holds_lengths(mask: object) -> bool:
    """Whether what stands in the place of a mask are the lengths of examples."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int64


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Attended:
    """Scaled dot-product attention, query [B, heads, T, d] → [B, T, heads, d]; causal within each example when the mask holds lengths."""
    kind = query.dtype
    narrow = query.device.type == "cpu" and kind in {torch.bfloat16, torch.float16} and query.requires_grad
    if not narrow:
        return _attend(module, query, key, value, attention_mask, **options)
    # The CPU's backward kernel takes three times as long for narrow numbers as for fp32 (90 places, 10 heads of 64).
    mask = attention_mask.float() if _is_float(attention_mask) else attention_mask
    with torch.autocast("cpu", enabled=False):
        attended, weights = _attend(module, query.float(), key.float(), value.float(), mask, **options)
    return attended.to(kind), weights


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Attended:
    if not holds_lengths(attention_mask):
        plain: Attended = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return plain
    assert attention_mask is not None
    lengths: list[int] = attention_mask.flatten().tolist()
    window = options.get("sliding_window")
    pieces = zip(lengths, *(whole.split(lengths, dim=2) for whole in (query, key, value)), strict=True)
    # One piece at a time: splitting and joining are each one operation for autograd, and no piece computes what a mask would hide.
    attended = [
        sdpa_attention_forward(module, q, k, v, _band(length, window, q), **options)[0] for length, q, k, v in pieces
    ]
    return torch.cat(attended, dim=1), None


def _is_float(mask: Tensor | None) -> TypeGuard[Tensor]:
    return mask is not None and mask.is_floating_point()


def _band(length: int, window: int | None, like: Tensor) -> Tensor | None:
    """The mask of an example that is longer than the window of its layer, [1, 1, length, length]; None where causality says it all."""
    if not window or length <= window:
        return None
    place = torch.arange(length, device=like.device)
    distance = place[:, None] - place[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def attends_within(model: nn.Module) -> bool:
    """Whether this model keeps the examples of a row apart: it attends through transformers' table of attentions, takes positions, and has no other memory."""
    config = getattr(model, "config", None)
    table = getattr(sys.modules.get(type(model).__module__), "ALL_ATTENTION_FUNCTIONS", None)
    found = table.get_interface("sdpa", None) if table is not None else None
    return (
        getattr(found, "__wrapped__", found) is attend  # engine.train.compiled wraps it while blocks are compiled
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and "position_ids" in inspect.signature(type(model).forward).parameters
        and not getattr(model, "_is_stateful", False)
    )


ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
