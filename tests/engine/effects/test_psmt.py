"""Learning while serving on real digits under changing corruption: frozen, batch statistics, mean teacher, CoTTA's restore, and both forms of PSMT."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.parts.teaching import MeanTeacher, Teaching

SEEDS, ROUNDS, BATCH = (1, 2), 6, 64


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """900 training and 897 test images of sklearn's handwritten digits, [N, 1, 8, 8] in 0 … 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]
    return images[:900], labels[:900], images[900:], labels[900:]


def trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def block(into: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]

    model = nn.Sequential(
        *block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    images, labels, _, _ = digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(12):
        for index in torch.randperm(900, generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    return model.eval()


def corruptions(seed: int) -> list[Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    blur = torch.full((1, 1, 3, 3), 1 / 9)

    def impulse(x: Tensor) -> Tensor:
        hit = torch.rand(x.shape, generator=generator)
        return torch.where(hit < 0.12, torch.zeros(()), torch.where(hit > 0.88, torch.ones(()), x))

    def rotated(x: Tensor) -> Tensor:
        angle = torch.tensor(0.5)
        turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
        grid = functional.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, align_corners=False)

    return [
        lambda x: x + 0.4 * torch.randn(x.shape, generator=generator),
        lambda x: functional.conv2d(x, blur, padding=1),
        lambda x: 0.25 * x + 0.4,
        lambda x: (x + 0.6).clamp(0, 1.2),
        impulse,
        rotated,
    ]


def stream(seed: int, answer: Callable[[Tensor], Tensor]) -> list[float]:
    """Accuracy of each round over all corruptions, in order."""
    _, _, images, labels = digits(seed)
    spoil, found = corruptions(seed), []
    for _ in range(ROUNDS):
        right = total = 0
        for change in spoil:
            for index in torch.arange(len(images)).split(BATCH):
                if len(index) < BATCH:
                    continue
                guess = answer(change(images[index])).argmax(-1)
                right, total = right + int((guess == labels[index]).sum()), total + len(index)
        found.append(right / total)
    return found


def served(seed: int, **changes: Any) -> list[float]:
    values: dict[str, Any] = {"form": "code", "learning_rate": 1e-3, "momentum": 0.99, "quantile": 0.03, "anchor": 500.0, "anchor_to": "source",
                              "restore": 0.0, "seed": seed, **changes}  # fmt: skip
    teacher = MeanTeacher(trained(seed), lambda model, batch: model(batch), Teaching(**values))
    if values["anchor"] or values["form"] == "paper":
        teacher.measure_fisher(digits(seed)[0][:200].split(1))
    return stream(seed, teacher.step)


@pytest.mark.effects
def test_it_keeps_up_with_changing_corruption(effect_row: Any) -> None:
    ways: dict[str, Callable[[int], list[float]]] = {
        "frozen": lambda seed: _frozen(seed),
        "batch statistics": lambda seed: stream(
            seed, MeanTeacher(trained(seed), lambda m, b: m(b), _still(seed)).answer
        ),
        "mean teacher": lambda seed: served(seed, form="paper", quantile=0.0, anchor=0.0),
        "random restore of 1 % (CoTTA)": lambda seed: served(
            seed, form="paper", quantile=0.0, anchor=0.0, restore=0.01
        ),
        "code form": lambda seed: served(seed),
        "paper form, lag-one anchor": lambda seed: served(seed, form="paper", anchor_to="previous"),
        "paper form, source anchor": lambda seed: served(seed, form="paper"),
    }
    with torch.random.fork_rng():
        found = {name: [way(seed) for seed in SEEDS] for name, way in ways.items()}
    first = {name: statistics.mean(run[0] for run in runs) for name, runs in found.items()}
    last = {name: statistics.mean(run[-1] for run in runs) for name, runs in found.items()}
    shown = "; ".join(f"{name} {first[name]:.1%} → {last[name]:.1%}" for name in ways)
    ahead = last["code form"] - last["frozen"]
    effect_row(
        slug="psmt", behaviour=f"Accuracy on sklearn digits, six corruptions in turn, {ROUNDS} rounds (first → last round): adapting against the frozen model.",
        baseline="the frozen model; batch statistics alone", ours=f"code form {first['code form']:.1%} → {last['code form']:.1%} (seeds 1, 2)",
        theirs=f"frozen {last['frozen']:.1%}, batch statistics {last['batch statistics']:.1%}", verdict="holds" if ahead >= 0.25 else "not seen at this size",
        paper="best of the compared methods (abstract)", note=shown,
    )  # fmt: skip
    best_other = max(last["mean teacher"], last["random restore of 1 % (CoTTA)"])
    forms = {name: last[name] for name in ways if "form" in name}
    effect_row(
        slug="psmt", behaviour="The same stream: holding parameters back against a plain mean teacher and CoTTA's random restore.",
        baseline="mean teacher; random restore of 1 %", ours=", ".join(f"{name} {value:.1%}" for name, value in forms.items()),
        theirs=f"mean teacher {last['mean teacher']:.1%}, restore {last['random restore of 1 % (CoTTA)']:.1%}",
        verdict="holds" if max(forms.values()) > best_other + 0.01 else "not seen at this size" if max(forms.values()) > best_other - 0.01 else "opposite",
        paper="better than both (unconfirmed)", note="No method collapsed in these rounds, so the advantage that the paper reports has nothing to show.",
    )  # fmt: skip
    assert ahead >= 0.2, "adapting is far ahead of the frozen model"
    assert last["code form"] >= last["batch statistics"] - 0.01
    assert last["code form"] >= first["code form"] - 0.01, "the default form does not decline"


def _still(seed: int) -> Teaching:
    return Teaching(
        form="paper",
        learning_rate=0.0,
        momentum=1.0,
        quantile=0.0,
        anchor=0.0,
        anchor_to="source",
        restore=0.0,
        seed=seed,
    )


def _frozen(seed: int) -> list[float]:
    model = trained(seed)
    with torch.no_grad():
        return stream(seed, model)
