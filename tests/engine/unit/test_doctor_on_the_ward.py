"""A quick round through the ward: a few illnesses and a few healthy runs of the study `doctor`, in the real loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.bench.doctor import wilson
from engine.bench.ward import Case, Ward, healthy_cases, sick_cases
from engine.methods.early_dynamics_stopping import EarlyDynamics, EarlyDynamicsStopping
from engine.methods.run_doctor import Doctor, RunDoctor
from engine.parts.doctor import Plan

SICK = {case.name: case for case in sick_cases()}
HEALTHY = {case.name: case for case in healthy_cases()}
ROUND = [
    "rate × 100, classes", "rate / 1000, classes", "not a number in the data", "all labels masked", "frozen by mistake", "labels shuffled",
    "explodes late",
]  # fmt: skip
WELL = [name for name in HEALTHY if "classify" in name][1:9:3]


@pytest.fixture(scope="module")
def ward() -> Iterator[Ward]:
    torch.set_num_threads(1)
    ward = Ward()
    yield ward
    ward.close()


@pytest.mark.parametrize("name", ROUND)
def test_the_illness_is_found_and_a_replay_says_the_same(ward: Ward, name: str) -> None:
    case = SICK[name]
    case = replace(
        case, base="" if case.task == "classify" else "raw"
    )  # teaching the decoder takes longer than this round
    judged = ward.judge(case, 41)
    assert judged.hit is not None, [signal.rule for _, signal in judged.said]
    assert judged.run is not None
    plan = next(watcher.plan for watcher in judged.run.slots.watchers if isinstance(watcher, Doctor))
    assert replayed(judged.looks, plan) == judged.said
    for _, signal in judged.said:
        json.dumps(signal.to_dict())
    early = EarlyDynamics(EarlyDynamicsStopping.Params())
    stops = {signal.rule for look in judged.looks for signal in early.see(look) if signal.action == "stop"}
    assert not stops or judged.warned


@pytest.mark.parametrize("name", WELL)
def test_a_healthy_run_is_left_in_peace(ward: Ward, name: str) -> None:
    assert ward.judge(HEALTHY[name], 41).warned == []


def replayed(looks: list, plan: Plan) -> list:  # type: ignore[type-arg]
    """What a new doctor says of a stored stream."""
    doctor = Doctor(RunDoctor.Params(), plan)
    return [(look.step, signal) for look in looks for signal in doctor.see(look)]


def test_the_suite_is_as_wide_as_it_says() -> None:
    assert len(SICK) >= 20 and len(HEALTHY) >= 50
    methods = {case.methods[0][0] for case in HEALTHY.values()}
    assert len(methods) >= 6 and {case.task for case in HEALTHY.values()} >= {"classify", "causal_lm", "instruct"}
    assert all(isinstance(case, Case) and case.rules for case in SICK.values())
    assert all(not case.rules and case.sabotage is None for case in HEALTHY.values())


def test_the_interval_of_a_share_is_that_of_wilson() -> None:
    low, high = wilson(9, 10)
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert wilson(0, 112)[1] < 0.05
