"""AdamR against a loop written out and against torch.optim; its reference survives checkpoints and remaps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.core.recipe import parse_recipe
from engine.methods.adamr import AdamR, PulledAdam
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.train import checkpoint
from engine.train.parts import Remap
from engine.train.trainables import Trainables, optimizer_bytes
from tests.engine.tiny import Tiny, lay, metric_rows

SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "fresh.head.weight": (3, 6), "never": (4,)}


def start(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradients(steps: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator) * 0.3 for n, s in SHAPES.items() if n != "never"} for _ in range(steps)
    ]


def build(**params: Any) -> tuple[Trainables, torch.optim.Optimizer, Any]:
    (factory,) = AdamR(AdamR.Params(**params)).parts(None)  # type: ignore[arg-type]
    trainables = Trainables({name: nn.Parameter(value.clone()) for name, value in start().items()})
    return trainables, factory.build(trainables, 0.02), factory


def play(trainables: Trainables, optimizer: torch.optim.Optimizer, grads: list[dict[str, Tensor]]) -> None:
    for grad in grads:
        for name, parameter in trainables.items():
            parameter.grad = grad[name].clone() if name in grad else None
        optimizer.step()


def by_hand(grads: list[dict[str, Tensor]], *, pull: float, form: str, lr: float = 0.02) -> dict[str, Tensor]:
    """The card's step C in fp64, number by number."""
    first = {name: value.double() for name, value in start().items()}
    now = {name: value.clone() for name, value in first.items()}
    m = {name: torch.zeros_like(value) for name, value in now.items()}
    v = {name: torch.zeros_like(value) for name, value in now.items()}
    for step, grad in enumerate(grads, 1):
        if step > 1:
            v_hat = torch.cat([v[name].flatten() / (1 - 0.999 ** (step - 1)) for name in grad])
            rate = lr * pull / (math.sqrt(float(v_hat.mean())) + 1e-8)
            for name in grad:
                if name.startswith("fresh."):
                    continue
                distance = now[name] - first[name]
                if form == "L2":
                    now[name] -= min(1.0, rate) * distance
                else:
                    now[name] -= distance.sign() * distance.abs().clamp(max=rate)
        for name, g in grad.items():
            m[name] = 0.9 * m[name] + 0.1 * g.double()
            v[name] = 0.999 * v[name] + 0.001 * g.double() ** 2
            m_hat, v_hat = m[name] / (1 - 0.9**step), v[name] / (1 - 0.999**step)
            now[name] -= lr * m_hat / (v_hat.sqrt() + 1e-8)
    return now


@pytest.mark.parametrize("form", ["L2", "L1"])
@pytest.mark.parametrize("pull", [0.3, 2.0, 1e4])
def test_steps_are_those_of_the_loop_by_hand(form: str, pull: float) -> None:
    grads = gradients(12)
    trainables, optimizer, _ = build(pull=min(pull, 10.0), form=form)
    for group in optimizer.param_groups:
        group["pull"] = pull if group["pull"] else 0.0  # beyond the dial's range, to see the bound at work
    play(trainables, optimizer, grads)
    expected = by_hand(grads, pull=pull, form=form)
    for name, parameter in trainables.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=2e-6)
    assert torch.equal(trainables["never"], start()["never"])  # no gradient, no step, no state
    assert trainables["never"] not in optimizer.state or not optimizer.state[trainables["never"]]


@pytest.mark.parametrize("form", ["L2", "L1"])
def test_without_a_pull_it_is_adam_and_adamw_bit_for_bit(form: str) -> None:
    grads = gradients(10)
    ours, optimizer, _ = build(pull=0.0, form=form)
    play(ours, optimizer, grads)
    for theirs, kind in ((torch.optim.Adam, {}), (torch.optim.AdamW, {"weight_decay": 0.0})):
        other = Trainables({name: nn.Parameter(value.clone()) for name, value in start().items()})
        play(other, theirs(list(other), lr=0.02, fused=True, **kind), grads)
        assert all(torch.equal(ours[name], other[name]) for name in SHAPES)
    assert all("reference" not in state for state in optimizer.state.values())


def test_the_reference_is_the_value_before_the_first_step_and_heads_have_none() -> None:
    trainables, optimizer, _ = build(pull=0.5)
    play(trainables, optimizer, gradients(5))
    for name in ("a.weight", "a.bias"):
        assert torch.equal(optimizer.state[trainables[name]]["reference"], start()[name])
    assert "reference" not in optimizer.state[trainables["fresh.head.weight"]]
    numbers = 30 + 6
    assert optimizer_bytes(optimizer) == 4 * (
        3 * numbers + 2 * 18 + 3
    )  # three fp32 a pulled number, two a head's, a counter a tensor


def test_a_strong_pull_keeps_the_weights_near_their_start() -> None:
    grads = gradients(40)
    norms = {}
    for pull in (0.0, 1.0, 10.0):
        trainables, optimizer, _ = build(pull=pull)
        play(trainables, optimizer, grads)
        norms[pull] = float((trainables["a.weight"] - start()["a.weight"]).norm().detach())
    assert norms[10.0] < norms[1.0] < norms[0.0]
    trainables, optimizer, _ = build(pull=10.0, form="L1")
    play(trainables, optimizer, grads)
    step = (trainables["a.weight"] - start()["a.weight"]).abs().detach()
    assert float(step.max()) <= 0.02 * 3  # every step starts at the reference again


def test_a_remap_carries_the_reference_and_new_numbers_start_from_themselves() -> None:
    trainables, optimizer, factory = build(pull=0.5)
    play(trainables, optimizer, gradients(3))
    old = trainables["a.weight"].detach()
    grown = nn.Parameter(torch.cat([old, torch.full((2, 5), 7.0)]))
    index = torch.cat([torch.arange(30), torch.full((10,), -1)])
    remap = Remap(replaced={"a.weight": grown}, tensors={"a.weight": ("a.weight", index)})
    factory.remap(optimizer, remap, trainables)
    trainables.apply(remap)
    reference = optimizer.state[grown]["reference"]
    assert torch.equal(reference[:6], start()["a.weight"]) and torch.equal(reference[6:], torch.full((2, 5), 7.0))
    grown.grad = torch.ones_like(grown)
    optimizer.step()
    assert torch.isfinite(grown).all()


def run(
    tiny: Tiny, folder: Path, methods: list[tuple[str, dict[str, Any]]], task: str = "causal_lm", **settings: Any
) -> Path:
    lay(folder, tiny.recipe(methods, task=task, **settings))
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result
    return folder


def distance(folder: Path) -> float:
    """How far the trainables moved from the start, new heads apart."""
    first, last = (
        checkpoint.load(path).trainables for path in (checkpoint.listed(folder)[0], checkpoint.listed(folder)[-1])
    )
    return float(sum((last[n] - first[n]).square().sum() for n in first if not n.startswith("fresh.")) ** 0.5)


@pytest.mark.parametrize("task", ["causal_lm", "classify"])
def test_together_with_other_slots(tiny: Tiny, tmp_path: Path, task: str) -> None:
    others: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {}), ("clip", {}), ("cosine", {}), ("patience", {})]
    rows = {}
    for pull in (0.0, 5.0):
        folder = run(
            tiny, tmp_path / str(pull), [*others, ("adamr", {"pull": pull})], task, checkpoint_every=8, evaluations=1
        )
        last = checkpoint.load(checkpoint.listed(folder)[-1])
        pulled = {path.rpartition("/")[0] for path in last.optimizer if path.endswith("/reference")}
        assert pulled == ({n for n in last.trainables if not n.startswith("fresh.")} if pull else set())
        rows[pull] = metric_rows(folder)
    assert rows[0.0][0] == rows[5.0][0] and rows[0.0][-1]["loss"] != rows[5.0][-1]["loss"]


def test_adapters_are_pulled_towards_their_own_start(tiny: Tiny, tmp_path: Path) -> None:
    adapter = ("lora", {"r": 4, "alpha": 8})
    moved = {
        pull: distance(
            run(
                tiny,
                tmp_path / str(pull),
                [adapter, ("adamr", {"pull": pull})],
                evaluations=1,
                max_steps=12,
                checkpoint_every=12,
            )
        )
        for pull in (0.0, 10.0)
    }
    assert moved[10.0] < 0.9 * moved[0.0]


def test_two_optimizers_are_refused_with_the_rule(tiny: Tiny) -> None:
    recipe = tiny.recipe([("full-finetuning", {}), ("adamr", {})]).model_dump(mode="json")
    recipe["methods"].append({"slug": "adamw", "params": {}})
    (fault,) = check(parse_recipe(recipe)).faults
    assert fault.code == "slot_taken" and "Exactly one" in fault.why and "AdamR" in fault.way_out


def test_a_gradient_of_zero_everywhere_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = PulledAdam([{"params": [parameter], "pull": 1.0}], form="L2", lr=0.1)
    for _ in range(3):
        parameter.grad = torch.zeros(3)
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
