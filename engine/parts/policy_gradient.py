"""The clipped policy gradient over groups of answers: advantages within a group, ratios per token, and squashing for answers to other prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.parts.losses import num_supervised
from engine.parts.sampling import token_logprobs
from engine.tasks.batching import IGNORED
from engine.train.parts import Loss, Objective

SMALLEST_SCALE = 1e-4  # of the squashing, so that tiny ratios are not blown up without bound
_EPSILON = 1e-6


def group_advantages(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-6) within each group; rewards [groups, k], the standard deviation that of a sample (k - 1)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + _EPSILON)


@dataclass(frozen=True, kw_only=True)
class Squash:
    """How the ratio of an answer to another prompt is tamed.

    "percentile": r / (r + g) with g the `quantile` of r over all such tokens of the scope, at least 1e-4. "constant": the same with g fixed.
    "power": r ** exponent. "off": r itself.
    """

    kind: Literal["percentile", "constant", "power", "off"] = "percentile"
    quantile: float = 0.9
    constant: float = 0.1
    exponent: float = 0.5

    def scale(self, ratios: Tensor) -> Tensor:
        """g, a detached scalar: from the ratios of the scope, or the constant."""
        if self.kind == "constant" or not ratios.numel():
            return torch.as_tensor(self.constant, dtype=ratios.dtype, device=ratios.device)
        return ratios.detach().quantile(self.quantile).clamp_min(SMALLEST_SCALE)

    def apply(self, ratio: Tensor, scale: Tensor) -> Tensor:
        """The squashed ratio; `scale` is broadcast against it."""
        if self.kind == "off":
            return ratio
        return ratio**self.exponent if self.kind == "power" else ratio / (ratio + scale)


class PolicyGradient(Objective):
    """Token mean of max(-A r, -A clip(r)). Rows that answer another prompt (`on_policy` false) are squashed instead of clipped.

    Reads from a batch, beside ids, mask and labels [B, T]: old_logprobs [B, T] (place t holds that of token t), advantages [B],
    on_policy [B]; ref_logprobs [B, T] where a distance to a reference is charged; squash_scale [B] where the scope is the whole batch.
    """

    def __init__(self, *, clip_low: float, clip_high: float, kl: float = 0.0, squash: Squash | None = None) -> None:
        self.clip_low, self.clip_high, self.kl, self.squash = clip_low, clip_high, kl, squash or Squash()
        self._sums: dict[str, Any] = {}

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(num_supervised(batch["labels"]))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator) -> Loss:
        counted = batch["labels"][:, 1:] != IGNORED  # [B, T-1]
        new = token_logprobs(model, batch)  # [B, T-1]
        ratio = torch.exp((new - batch["old_logprobs"][:, 1:]).clamp(-60, 30))
        advantage = batch["advantages"][:, None]  # [B, 1]
        plain = batch["on_policy"][:, None] & counted
        hinted = ~batch["on_policy"][:, None] & counted

        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        each = torch.maximum(-advantage * ratio, -advantage * clipped)  # [B, T-1]
        if bool(hinted.any()):
            scale = batch["squash_scale"][:, None] if "squash_scale" in batch else self.squash.scale(ratio[hinted])
            each = torch.where(hinted, -advantage * self.squash.apply(ratio, scale), each)
        if self.kl > 0:
            away = batch["ref_logprobs"][:, 1:] - new
            each = each + self.kl * (away.exp() - away - 1)
            self._add("kl", ((away.exp() - away - 1) * counted).sum(), counted.sum())
        # As in the papers: a token is clipped when the bound is what the loss used, so that it has no gradient.
        bound = ((ratio < 1 - self.clip_low) & (advantage < 0)) | ((ratio > 1 + self.clip_high) & (advantage > 0))
        self._add("clip_fraction", (bound & plain).sum(), plain.sum())
        if "squash_scale" in batch or bool(hinted.any()):
            self._add("hinted_ratio", (ratio.detach() * hinted).sum(), hinted.sum())
        return Loss(total=(each * counted).sum(), weight=float(counted.sum()))

    def numbers(self) -> dict[str, float]:
        sums, self._sums = self._sums, {}
        return {name: float(total) / max(1.0, float(count)) for name, (total, count) in sums.items()}

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before[0] + total.detach(), before[1] + count.detach())
