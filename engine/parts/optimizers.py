"""Building optimizers over trainables: which parameters decay, and the quickest kernel the device has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from engine.core.facts import ModelFacts
from engine.core.params import HyperParams, dial

_FUSED = {"cpu", "cuda"}


_FULL_RATES = (
    (2_000_000, 5e-4),
    (20_000_000, 3e-4),
    (200_000_000, 1e-4),
    (2_000_000_000, 3e-5),
)  # below so many parameters -> rate


def full_rate(model: ModelFacts) -> float:
    """A learning rate for training whole weights of a pretrained model: less for larger ones; measured on small ones, usual for others."""
    size = model.num_parameters
    if model.kind == "encoder":
        return 2e-4 if size < 50_000_000 else 5e-5
    return next((rate for limit, rate in _FULL_RATES if size < limit), 1e-5)


def let_decay(parameter: nn.Parameter) -> None:
    """Mark a vector that stands for entries of a matrix: it decays like the matrix would."""
    parameter.decays = True  # type: ignore[attr-defined]


class Moments(HyperParams):
    """How an optimizer of the Adam family remembers: direction, size, and the smallest divisor."""

    beta1: float = dial(
        0.9,
        label="Memory of the direction",
        unit="1",
        low=0.0,
        high=0.9999,
        paper=0.9,
        help="How long the direction of earlier steps is remembered; closer to 1 is longer.",
    )
    beta2: float = dial(
        0.999,
        label="Memory of the size",
        unit="1",
        low=0.0,
        high=0.999999,
        paper=0.999,
        help="How long the size of earlier gradients is remembered; closer to 1 is longer.",
    )
    eps: float = dial(
        1e-8,
        label="Smallest divisor",
        unit="1",
        low=1e-16,
        high=1.0,
        paper=1e-8,
        help="Keeps the division from exploding where gradients are nearly zero.",
    )


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, and vectors of matrix entries; biases, norms and every other vector do not."""
    every = list(parameters)
    decaying = [p.dim() >= 2 or getattr(p, "decays", False) for p in every]
    groups = [
        {"params": [p for p, decays in zip(every, decaying) if decays], "weight_decay": weight_decay},
        {"params": [p for p, decays in zip(every, decaying) if not decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def kernel(parameters: Iterable[nn.Parameter]) -> dict[str, bool]:
    """The constructor arguments of the quickest exact kernel: one fused pass where the device has it, lists of tensors elsewhere."""
    fused = all(p.device.type in _FUSED and p.is_floating_point() for p in parameters)
    return {"fused": True} if fused else {"foreach": True}


def gradients(trainables: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that exist."""
    return [p.grad for p in trainables if p.grad is not None]


def gradient_norm(trainables: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm over all gradients, left on their device."""
    return get_total_norm(gradients(trainables))
