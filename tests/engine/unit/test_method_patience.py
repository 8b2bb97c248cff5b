"""Patience: stops exactly when a brute-force reading of the scores says so, and survives an interruption."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from engine.core.facts import DataFacts, Facts, MachineFacts, ModelFacts
from engine.methods.patience import Patience, PatienceWatcher
from engine.train.parts import Look, Signal


def look(step: int, **scores: Any) -> Look:
    return Look(
        step=step, samples=step * 8, planned_samples=8000, planned_steps=1000, row={}, evaluation=scores or None
    )


def watch(values: list[float], **params: Any) -> list[tuple[int, Signal]]:
    watcher = PatienceWatcher(Patience.Params(**params))
    name = params.get("measure", "eval_loss")
    return [
        (place, signal)
        for place, value in enumerate(values)
        for signal in watcher.see(look(place * 10, **{name: value}))
    ]


def brute_force(values: list[float], patience: int, min_delta: float) -> int | None:
    """The first place at which the last `patience` values all fail to improve on the best before them."""
    best, waited = math.inf, 0
    for place, value in enumerate(values):
        if best - value > 0 and best - value >= min_delta:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return place
    return None


@pytest.mark.parametrize("seed", range(30))
def test_it_stops_where_brute_force_stops(seed: int) -> None:
    rng = random.Random(seed)
    values = [2 / (k + 1) ** 0.3 + rng.gauss(0, 0.1) for k in range(40)]
    patience, min_delta = rng.randint(1, 6), rng.choice([0.0, 0.01, 0.1])
    said = watch(values, patience=patience, min_delta=min_delta)
    expected = brute_force(values, patience, min_delta)
    assert [place for place, _ in said] == ([] if expected is None else [expected])
    assert all(signal.action == "stop" and "." in signal.message for _, signal in said)


def test_steps_without_a_measurement_do_not_count() -> None:
    watcher = PatienceWatcher(Patience.Params(patience=2))
    for step in range(1, 100):
        assert not list(watcher.see(look(step)))


def test_accuracy_counts_upwards() -> None:
    rising, falling = [0.1 * k for k in range(9)], [1 - 0.1 * k for k in range(9)]
    assert watch(rising, patience=2, measure="eval_accuracy") == []
    assert [place for place, _ in watch(falling, patience=2, measure="eval_accuracy")] == [2]
    assert watch(falling, patience=2) == []


def test_a_score_that_is_not_a_number_is_no_improvement() -> None:
    assert [place for place, _ in watch([1.0, math.nan, math.nan, 0.5], patience=2)] == [2]
    ((place, signal),) = watch([math.nan, math.nan], patience=2)
    assert place == 1 and "not a number" in signal.message and json.dumps(signal.numbers, allow_nan=False)


def test_a_missing_score_is_said_once_and_never_stops() -> None:
    watcher = PatienceWatcher(Patience.Params(patience=1, measure="eval_accuracy"))
    said = [signal for step in range(1, 9) for signal in watcher.see(look(step, eval_loss=1.0 + step))]
    assert [signal.action for signal in said] == ["warn"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_interruption_changes_no_verdict(cut: int) -> None:
    values = [3.0, 2.5, 2.6, 2.4, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5]
    whole = [(place, signal.rule) for place, signal in watch(values, patience=4)]
    first, second = (PatienceWatcher(Patience.Params(patience=4)) for _ in range(2))
    said = [(place, s.rule) for place in range(cut) for s in first.see(look(place * 10, eval_loss=values[place]))]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    said += [(p, s.rule) for p in range(cut, len(values)) for s in second.see(look(p * 10, eval_loss=values[p]))]
    assert said == whole and len(whole) == 1


def facts(task: str) -> Facts:
    model = ModelFacts(
        source="", path="", family="llama", kind="decoder", architecture="", num_parameters=0, num_layers=0, hidden_size=0,
        vocab_size=0, max_positions=0, dtype="F32", tied_embeddings=False, has_chat_template=False, tensors={}, linears={},
    )  # fmt: skip
    data = DataFacts(source="", path="", format="csv", shape="text", num_rows=9, columns=(), mapping={})
    return Facts(
        task=task,
        model=model,
        data=data,
        machine=MachineFacts(device="cpu", device_name="", memory_bytes=0, num_threads=1, has_bf16=False),
    )


def test_a_score_that_the_goal_does_not_have_is_refused() -> None:
    texts, classes = facts("causal_lm"), replace(facts("classify"))
    refused = {
        (m, f.task): bool(Patience.check(Patience.Params(measure=m), f))
        for m in ("eval_loss", "eval_accuracy", "eval_perplexity")
        for f in (texts, classes)
    }
    assert refused == {
        ("eval_loss", "causal_lm"): False,
        ("eval_loss", "classify"): False,
        ("eval_accuracy", "causal_lm"): True,
        ("eval_accuracy", "classify"): False,
        ("eval_perplexity", "causal_lm"): False,
        ("eval_perplexity", "classify"): True,
    }
