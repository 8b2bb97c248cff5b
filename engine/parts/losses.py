"""Sums of losses over supervised items, in fp32, so that batches of any size add up to the same number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.tasks.base import States

IGNORED = -100
CHUNK_BYTES = 1 << 25  # of logits that exist at once


def cross_entropy_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of -log p(label) over all rows; logits [n, classes], labels [n]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


def num_supervised(labels: Tensor) -> int:
    """How many items of a batch are learned from: labels [batch], or [batch, length] where place t is predicted from the places before it."""
    return int((labels if labels.dim() == 1 else labels[:, 1:]).ne(IGNORED).sum())


def head_cross_entropy_sum(states: States, label_smoothing: float = 0.0) -> Tensor:
    """`cross_entropy_sum` of the output layer's answers, of which only a chunk exists at a time.

    The gradient is made along with the loss, chunk by chunk (as in Liger's fused linear cross-entropy, arXiv 2410.10989), so that nothing of the size
    [n, vocabulary] is kept. Few logits go the plain way.
    """
    hidden, head = states.hidden, states.head
    vocabulary = head.weight.shape[0]
    if hidden.shape[0] * vocabulary * 4 <= CHUNK_BYTES:
        return cross_entropy_sum(head(hidden), states.labels, label_smoothing)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    total: Tensor = _HeadCrossEntropy.apply(hidden, head.weight, head.bias, states.labels, label_smoothing, dtype)
    return total


class _HeadCrossEntropy(torch.autograd.Function):
    """sum_i [ logsumexp(z_i) - (1 - e) z_i,y - e mean(z_i) ] with z = h W^T + b in chunks of rows, and its gradients for h, W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        vocabulary = weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * vocabulary))
        with torch.autocast(hidden.device.type, enabled=False):
            given, table = hidden.to(dtype), weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_hidden = torch.empty_like(hidden) if wants_hidden else None
            d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
            d_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wants_bias else None
            for begin in range(0, hidden.shape[0], rows):
                part, answers = given[begin : begin + rows], labels[begin : begin + rows, None]
                logits = F.linear(part, table, offset).float()  # [rows, vocabulary]
                norms = logits.logsumexp(-1, keepdim=True)
                total += norms.sum() - (1 - smoothing) * logits.gather(1, answers).sum()
                if smoothing:
                    total -= smoothing / vocabulary * logits.sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                grad = logits.sub_(norms).exp_()  # softmax
                grad.scatter_add_(1, answers, torch.full_like(norms, smoothing - 1))
                if smoothing:
                    grad -= smoothing / vocabulary
                if d_bias is not None:
                    d_bias += grad.sum(0)
                narrow = grad.to(dtype)
                if d_hidden is not None:
                    d_hidden[begin : begin + rows] = narrow @ table
                if d_weight is not None:
                    d_weight += narrow.t() @ part
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.kinds = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_kind, bias_kind = ctx.kinds
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(weight_kind),
            None if d_bias is None else (d_bias * grad).to(bias_kind),
            None,
            None,
            None,
        )
