"""Sums of losses over supervised items, in fp32, so that batches of any size add up to the same number."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def cross_entropy_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of -log p(label) over all rows; logits [n, classes], labels [n]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


def num_supervised(labels: Tensor) -> int:
    """How many items of a batch are learned from: labels [batch], or [batch, length] where place t is predicted from the places before it."""
    return int((labels if labels.dim() == 1 else labels[:, 1:]).ne(IGNORED).sum())
