"""Small networks on scikit-learn's handwritten digits, saved as model folders, and the context of a transformation with examples of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

from engine.ops.transform import TransformContext
from tests.engine.folders import write_model

WIDTH, BATCH = 128, 64


class DigitNet(nn.Module):
    """64 pixels, two hidden layers, ten classes; layers have numbers in their names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        out: Tensor = self.classifier(x)
        return out


@dataclass(frozen=True)
class Split:
    """Pixels [n, 64] and classes: to learn from, to choose with, to report."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int, change: Any = None) -> Split:
    """The digits, each image [8, 8] changed by `change`; one split of the images for every change."""
    images, classes = load_digits(return_X_y=True)
    pictures = (images / 16).reshape(-1, 8, 8)
    if change is not None:
        pictures = np.stack([change(picture) for picture in pictures])
    x, y = torch.tensor(pictures, dtype=torch.float32).flatten(1), torch.tensor(classes)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([1100, 300, len(x) - 1400])
    return Split(*((x[part], y[part]) for part in parts))


def rotated(degrees: float) -> Any:
    """Turn an image."""
    return lambda picture: ndimage.rotate(picture, degrees, reshape=False, order=1)


def shifted(down: int, right: int) -> Any:
    """Move an image by whole pixels."""
    return lambda picture: ndimage.shift(picture, (down, right), order=0)


def fit(
    data: Split, *, start: dict[str, Tensor] | None, steps: int, rate: float, seed: int, optimizer: Any = None
) -> dict[str, Tensor]:
    """Train on the training part; `optimizer(parameters)` is Adam unless given."""
    torch.manual_seed(seed)
    net = DigitNet()
    if start is not None:
        net.load_state_dict(start)
    moves = torch.optim.Adam(net.parameters(), lr=rate) if optimizer is None else optimizer(net.parameters())
    generator = torch.Generator().manual_seed(seed)
    x, y = data.train
    for _ in range(steps):
        rows = torch.randint(0, len(x), (BATCH,), generator=generator)
        moves.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        moves.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@torch.no_grad()
def accuracy(weights: dict[str, Tensor], part: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    net = DigitNet()
    net.load_state_dict(weights)
    return float((net(part[0]).argmax(1) == part[1]).double().mean())


class DigitContext(TransformContext):
    """The context of a transformation that is given the validation part of some digits."""

    def __init__(self, folders: list[Path], parts: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.folders, self.recipe = folders, SimpleNamespace(data=object())
        self.task = SimpleNamespace(
            model_kinds=("decoder",), forward_logits=lambda model, batch: (model(batch["x"]), batch["labels"])
        )
        self.batches = [{"x": x, "labels": y} for x, y in parts]

    def calibration(self, num: int, length: int | None = None) -> list[dict[str, Tensor]]:
        return self.batches

    def load_model(self, index: int = 0) -> nn.Module:
        net = DigitNet()
        net.load_state_dict(load_file(self.folders[index] / "model.safetensors"))
        return net.eval()


def save(home: Path, **models: dict[str, Tensor]) -> list[Path]:
    """Each model as a folder of its name."""
    return [write_model(home / name, weights) for name, weights in models.items()]
