"""The product of base and low-rank addition against plain autograd and against peft's own layers, and what it costs beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.bench.backward import saved_bytes
from engine.parts.lowrank_product import low_rank_product

NAMES = ("x", "weight", "bias", "a", "b")


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


def operands(dtype: torch.dtype, *, r: int = 3, learning: tuple[str, ...] = ("x", "a", "b")) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (2, 7, 12), "weight": (10, 12), "bias": (10,), "a": (r, 12), "b": (10, r)}
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_(name in learning) for name, tensor in made.items()}


def gradients(product: Callable[..., Tensor], found: dict[str, Tensor], *more: Any) -> list[Tensor]:
    out = product(*(found[name] for name in NAMES), 1.7, *more)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    learning = [tensor for tensor in found.values() if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), learning)]


@pytest.mark.parametrize("r", [1, 3, 9])
@pytest.mark.parametrize("learning", [("x", "a", "b"), ("a", "b"), ("x",), NAMES], ids=lambda names: "+".join(names))
def test_value_and_gradients_are_those_of_autograd(r: int, learning: tuple[str, ...]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        one = gradients(low_rank_product, operands(dtype, r=r, learning=learning))
        for mine, theirs in zip(one, gradients(plain, operands(dtype, r=r, learning=learning)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=10 * tolerance)


def test_a_listener_hears_the_dense_gradient_and_changes_nothing() -> None:
    heard: list[Tensor] = []
    found = operands(torch.float32)
    with_listener = gradients(low_rank_product, found, heard.append)
    for mine, theirs in zip(with_listener, gradients(plain, operands(torch.float32)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    dense = gradients(plain, operands(torch.float32, learning=("weight",)))[1]
    torch.testing.assert_close(heard[0], dense, rtol=1e-5, atol=1e-5)
    assert len(heard) == 1


def test_under_autocast_both_run_in_bf16_and_gradients_come_home_in_fp32() -> None:
    def halved(product: Callable[..., Tensor]) -> list[Tensor]:
        found = operands(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = product(*(found[name] for name in NAMES), 1.7)
        assert out.dtype == torch.bfloat16
        return list(torch.autograd.grad(out.float().sum(), [found["x"], found["a"], found["b"]]))

    exact = operands(torch.float64)
    truth = torch.autograd.grad(plain(*exact.values(), 1.7).sum(), [exact["x"], exact["a"], exact["b"]])
    for mine, theirs, true in zip(halved(low_rank_product), halved(plain), truth, strict=True):
        assert mine.dtype == torch.float32
        off = [(one - true).norm() / true.norm() for one in (mine, theirs)]
        assert off[0] < 0.01 + off[1]  # bf16 keeps eight bits: no farther from the truth than the plain way


def test_without_anything_that_learns_nothing_is_kept() -> None:
    found = operands(torch.float32, learning=())
    torch.testing.assert_close(low_rank_product(*found.values(), 1.7), plain(*found.values(), 1.7))
    assert not low_rank_product(*found.values(), 1.7).requires_grad


# ── peft's layer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pair(**settings: Any) -> tuple[nn.Module, nn.Module]:
    """A small network with LoRA: in peft's own layers, and with ours."""
    from peft import LoraConfig, inject_adapter_in_model

    from engine.parts.lora_layer import LoraLinear, quicken

    made = []
    for quick in (False, True):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(384, 512), nn.SiLU(), nn.Linear(512, 384))
        wanted = {"r": 8, "lora_alpha": 16, "target_modules": ["0", "2"], "init_lora_weights": False, **settings}
        inject_adapter_in_model(LoraConfig(**wanted), network)
        for module in list(network.modules()):
            if quick:
                quicken(module)
        assert sum(isinstance(module, LoraLinear) for module in network.modules()) == (2 if quick else 0)
        made.append(network)
    return made[0], made[1]


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.3}, {"lora_bias": True}], ids=str
)
def test_our_layer_answers_and_learns_like_that_of_peft(settings: dict[str, Any]) -> None:
    theirs, ours = pair(**settings)
    x = torch.randn(16, 384, generator=torch.Generator().manual_seed(1))
    for network in (theirs, ours):
        network.train()
        torch.manual_seed(9)
        network(x).square().mean().backward()
    torch.manual_seed(9)
    one = theirs(x)
    torch.manual_seed(9)
    torch.testing.assert_close(ours(x), one, rtol=1e-5, atol=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) is (other.grad is None), name
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_two_adapters_merged_ones_and_silent_ones_are_left_to_peft() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    x = torch.randn(4, 384, generator=torch.Generator().manual_seed(1))
    networks = pair()
    for network in networks:
        torch.manual_seed(4)
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        inject_adapter_in_model(config, network, adapter_name="second")
    theirs, ours = networks
    for change in (
        lambda layer: layer.set_adapter(["default", "second"]),
        lambda layer: layer.set_adapter("second"),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.merge(),
    ):
        for network in networks:
            for layer in (network[0], network[2]):  # type: ignore[index]
                change(layer)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_step_is_no_slower_than_peft_and_remembers_no_more() -> None:
    theirs, ours = pair()
    x = torch.randn(768, 384, generator=torch.Generator().manual_seed(1), requires_grad=True)
    seconds: dict[nn.Module, list[float]] = {theirs: [], ours: []}
    for turn in range(14):
        for network in (theirs, ours) if turn % 2 else (ours, theirs):
            start = time.process_time()
            network(x).sum().backward()
            seconds[network].append(time.process_time() - start)
    assert min(seconds[ours][2:]) < 1.1 * min(seconds[theirs][2:])  # about 0.8 where nothing else runs
    kept = [saved_bytes(lambda network=network: network(x).sum(), network) for network in (ours, theirs)]  # type: ignore[misc]
    assert kept[0] <= kept[1]
