"""Schedules as functions of the clock, AdamW against its own formula, and what full fine-tuning moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.io.facts import model_facts
from engine.methods.adamw import AdamW, AdamWFactory
from engine.methods.full_finetuning import FullFinetuning
from engine.parts.schedules import Shaped, falling_cosine, falling_line, level
from engine.train.clock import Clock
from engine.train.trainables import Trainables
from tests.engine.attached import Attached, facts_for, parameter_copy, random_batches
from tests.engine.tiny import Tiny


def factors(schedule: Shaped, total: int) -> list[float]:
    return [
        schedule.factor(Clock(total_steps=total, steps_per_epoch=total, num_samples=1, step=step))
        for step in range(total)
    ]


def test_constant_rises_and_stays() -> None:
    assert factors(Shaped(0.4, level), 5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert factors(Shaped(0.0, level), 3) == [1, 1, 1]


def test_linear_falls_in_a_straight_line() -> None:
    assert factors(Shaped(0.0, falling_line(0.0)), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(Shaped(0.0, falling_line(0.5)), 4) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_cosine_falls_along_half_a_cosine() -> None:
    assert factors(Shaped(0.0, falling_cosine(0.0)), 4) == pytest.approx(
        [1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]
    )
    assert factors(Shaped(0.0, falling_cosine(0.2)), 2) == pytest.approx([1, 0.6])


@pytest.mark.parametrize("total", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("shape", [level, falling_line(0.0), falling_cosine(0.0), falling_cosine(0.1)])
def test_every_step_moves_and_none_exceeds_the_rate(total: int, warmup: float, shape: Any) -> None:
    schedule = Shaped(warmup, shape)
    seen = factors(schedule, total)
    rise = schedule.warmup_steps(Clock(total_steps=total, steps_per_epoch=total, num_samples=1))
    assert all(0 < factor <= 1 for factor in seen) and max(seen) == 1
    assert seen[: rise + 1] == sorted(seen[: rise + 1]) and seen[rise:] == sorted(seen[rise:], reverse=True)


def test_each_single_slot_has_exactly_one_default() -> None:
    for slot in (Slot.OPTIMIZER, Slot.SCHEDULE, Slot.OBJECTIVE, Slot.UPDATE_RULE):
        assert len([m for m in catalogue().values() if slot in m.slots and m.default and not m.needs.tasks]) == 1, slot


def test_adamw_follows_its_formula_and_spares_vectors() -> None:
    torch.manual_seed(0)
    start = {"matrix": torch.randn(3, 4), "bias": torch.randn(4)}
    trainables = Trainables({name: nn.Parameter(value.clone()) for name, value in start.items()})
    params = AdamW.Params(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
    factory = AdamW(params).parts(None)[0]  # type: ignore[arg-type]
    assert isinstance(factory, AdamWFactory)
    optimizer = factory.build(trainables, 0.01)
    expected = {name: value.double() for name, value in start.items()}
    m, v = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for step in range(1, 6):
        for name, parameter in trainables.items():
            gradient = torch.randn(parameter.shape)
            parameter.grad = gradient
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.9 * v[name] + 0.1 * gradient.double() ** 2
            if name == "matrix":
                expected[name] = expected[name] * (1 - 0.01 * 0.1)
            expected[name] = expected[name] - 0.01 * (m[name] / (1 - 0.8**step)) / (
                (v[name] / (1 - 0.9**step)).sqrt() + 1e-6
            )
        optimizer.step()
    for name, parameter in trainables.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_full_finetuning_moves_every_weight_once(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32)
    before = parameter_copy(model)
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    attached = Attached(model, FullFinetuning(), facts)
    assert set(dict(attached.trainables.items())) == {name for name, _ in model.named_parameters()}  # tied weights once
    assert "lm_head.weight" not in dict(attached.trainables.items())
    attached.train(random_batches(400), 2)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert attached.part.export(model) is None and attached.part.merge(model)
    assert {name for name, _ in model.named_parameters()} <= FullFinetuning.claims(FullFinetuning.Params(), facts)


@pytest.mark.parametrize(("kind", "size", "rate"), [
    ("encoder", 22_000_000, 2e-4), ("encoder", 110_000_000, 5e-5), ("decoder", 260_000, 5e-4), ("decoder", 3_000_000, 3e-4), ("decoder", 60_000_000, 1e-4),
    ("decoder", 8_000_000_000, 1e-5)])  # fmt: skip
def test_full_finetuning_advises_smaller_rates_for_larger_models(tiny: Tiny, kind: str, size: int, rate: float) -> None:
    from dataclasses import replace

    model = replace(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), kind=kind, num_parameters=size)
    recipe = tiny.recipe([("full-finetuning", {})])
    (advice,) = FullFinetuning.suggest(recipe, FullFinetuning.Params(), facts_for(model, "causal_lm"))
    assert advice.where == "settings.learning_rate" and advice.value == rate and advice.reason.endswith(".")
