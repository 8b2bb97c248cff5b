"""peft's linear LoRA layer with the product of `lowrank_product` where that says the same; imports peft, so import it late."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from engine.parts.lowrank_product import low_rank_product


class LoraLinear(Linear):
    """Computes in one product what peft's layer computes in five steps; files, merging and all other cases are peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._alone(x) if not args and not kwargs else None
        if adapter is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        a, b, base = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.base_layer
        return low_rank_product(x, base.weight, base.bias, a, b, self.scaling[adapter])

    def _alone(self, x: Tensor) -> str | None:
        """The one active adapter, when it is a plain pair A, B in the number format of the input and nothing is dropped at random."""
        active = self.active_adapters
        if (
            self.disable_adapters
            or self.merged
            or len(active) != 1
            or active[0] not in self.lora_A
            or active[0] in self.lora_variant
        ):
            return None
        name: str = active[0]
        dropout, pair = self.lora_dropout[name], (self.lora_A[name], self.lora_B[name])
        if (self.training and getattr(dropout, "p", 0.0) > 0.0) or pair[0].bias is not None or pair[1].bias is not None:
            return None
        same = (
            torch.is_autocast_enabled(x.device.type) or x.dtype == self.base_layer.weight.dtype == pair[0].weight.dtype
        )
        return name if same else None


def quicken(layer: nn.Module) -> None:
    """Give one of peft's linear layers over an ordinary nn.Linear the quicker forward pass; any other layer stays as it is."""
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LoraLinear
