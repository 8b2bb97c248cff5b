"""Early signals inside one run: when each rule speaks, when none may, and that the verdicts depend on the stream alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.methods.early_dynamics_stopping import EarlyDynamics, EarlyDynamicsStopping
from engine.train.parts import Look, Signal

STEPS, BATCH = 400, 8  # window one ends at step 40, window two at step 120
Row = dict[str, Any]


def stream(
    change: Callable[[int, Row], None] | None = None,
    evaluations: dict[int, dict[str, float]] | None = None,
    *,
    steps: int = STEPS,
    warmup: int = 0,
) -> list[Look]:
    """A healthy run, changed row by row; an evaluation comes as a second look at the same row, as in the loop."""
    rng = np.random.default_rng(0)
    plan = {"samples": 0, "planned_samples": steps * BATCH, "planned_steps": steps, "warmup_steps": warmup}
    looks = []
    if evaluations and 0 in evaluations:
        looks.append(Look(step=0, row={}, evaluation=evaluations[0], **plan))
    for step in range(1, steps + 1):
        row: Row = {
            "loss": 3 / step**0.2 + 0.05 * float(rng.standard_normal()),
            "grad_norm": float(rng.lognormal(0, 0.2)),
            "tokens": step * 500,
            "clipped": 0.0,
        }
        if change:
            change(step, row)
        plan["samples"] = step * BATCH
        looks.append(Look(step=step, row=row, **plan))
        if evaluations and step in evaluations:
            looks.append(Look(step=step, row=row, evaluation=evaluations[step], **plan))
    return looks


def verdicts(looks: list[Look], **params: Any) -> list[tuple[int, Signal]]:
    watcher = EarlyDynamics(EarlyDynamicsStopping.Params(**params))
    return [(look.step, signal) for look in looks for signal in watcher.see(look)]


def rules(looks: list[Look], **params: Any) -> dict[str, tuple[int, str]]:
    """rule -> (step, action), without the summaries; every rule speaks once."""
    said = verdicts(looks, **params)
    names = [signal.rule for _, signal in said]
    assert len(names) == len(set(names))
    return {signal.rule: (step, signal.action) for step, signal in said if signal.action != "note"}


def held(
    start: float, *later: float, se: float = 0.02, general: list[float] | None = None
) -> dict[int, dict[str, float]]:
    """Evaluations at step 0 and at every 50th step."""
    return {
        50 * place: {
            "eval_loss": loss,
            "eval_loss_se": se,
            **({"general_loss": general[place], "general_loss_se": se} if general else {}),
        }
        for place, loss in enumerate((start, *later))
    }


def test_a_healthy_run_gets_two_summaries_and_no_complaint() -> None:
    said = verdicts(stream(evaluations=held(3.0, 2.0, 1.5, 1.4, general=[2.0, 2.01, 2.02, 2.03])))
    assert [(step, signal.action, signal.rule) for step, signal in said] == [
        (40, "note", "window-1"),
        (120, "note", "window-2"),
    ]
    assert said[0][1].numbers["steps"] == 35 and said[1][1].numbers["steps"] == 115


def test_the_summary_is_what_numpy_says() -> None:
    looks = stream()
    numbers = verdicts(looks)[0][1].numbers
    rows = [look.row for look in looks if 5 < look.step <= 40]
    norms = np.array([row["grad_norm"] for row in rows])
    assert numbers["norm"] == pytest.approx(np.median(norms))
    assert numbers["norm_cv"] == pytest.approx(np.subtract(*np.quantile(norms, [0.75, 0.25])) / np.median(norms))
    assert numbers["loss"] == pytest.approx(np.mean([row["loss"] for row in rows]))


def test_a_longer_warm_up_is_left_out() -> None:
    assert verdicts(stream(warmup=12))[0][1].numbers["steps"] == 28
    assert [signal.rule for _, signal in verdicts(stream(warmup=60))] == ["window-2"]


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_stops_at_once(key: str, value: float) -> None:
    def broken(step: int, row: Row) -> None:
        if step >= 33:
            row[key] = value

    assert rules(stream(broken)) == {"not-finite": (33, "stop")}


def test_a_runaway_stops_after_fifty_steps_as_counted_by_hand() -> None:
    def explode(step: int, row: Row) -> None:
        if step > 20:
            row["loss"] = 3 + 0.2 * (step - 20)

    looks = stream(explode)
    losses = [look.row["loss"] for look in looks]
    smooth, above, expected = losses[0], 0, 0
    for step, loss in enumerate(losses[1:], 2):
        smooth += 2 / 21 * (loss - smooth)
        above = above + 1 if step > 5 and smooth > 1.5 * losses[4] else 0
        if above == 50:
            expected = step
            break
    found = rules(looks)
    assert found["runaway"] == (expected, "stop") and expected > 50


def test_a_short_bump_is_no_runaway() -> None:
    def bump(step: int, row: Row) -> None:
        if 130 < step < 150:
            row["loss"] = 30.0

    assert rules(stream(bump)) == {}


def test_gaining_nothing_on_both_sets_stops_at_the_second_measurement() -> None:
    worse = stream(evaluations=held(2.0, 2.2, 2.3, 2.4, general=[3.0, 3.01, 3.02, 3.03]))
    assert rules(worse) == {"nothing-gained": (100, "stop")}
    assert rules(worse, worse_times=3) == {"nothing-gained": (150, "stop")}


def test_worse_on_the_task_but_better_in_general_goes_on() -> None:
    assert rules(stream(evaluations=held(2.0, 2.2, 2.3, 2.4, general=[3.0, 2.9, 2.9, 2.9]))) == {}


def test_within_two_standard_errors_nothing_is_said() -> None:
    assert rules(stream(evaluations=held(2.0, 2.2, 2.2, se=0.1, general=[3.0, 3.1, 3.1]))) == {}


def test_without_a_general_loss_the_rule_warns_instead() -> None:
    said = [
        signal for _, signal in verdicts(stream(evaluations=held(2.0, 2.2, 2.3))) if signal.rule == "nothing-gained"
    ]
    assert [signal.action for signal in said] == ["warn"] and "General ability was not measured" in said[0].message
    assert said[0].numbers["general_now"] is None


def test_watching_only_turns_stops_into_warnings() -> None:
    looks = stream(evaluations=held(2.0, 2.2, 2.3, 2.4, general=[3.0, 3.01, 3.02, 3.03]))
    (signal,) = [signal for _, signal in verdicts(looks, may_stop=False) if signal.action != "note"]
    assert signal.action == "warn" and "would have ended the run" in signal.message


def test_every_warning_of_the_card_has_its_cause() -> None:
    def clipped(step: int, row: Row) -> None:
        row["clipped"] = float(step % 10 != 0)

    def unsteady(step: int, row: Row) -> None:
        row["grad_norm"] = 10.0 if step % 2 else 0.5

    def climbing(step: int, row: Row) -> None:
        row["grad_norm"] = step / 4

    def climbing_while_the_loss_rises(step: int, row: Row) -> None:
        row.update(grad_norm=step / 4, loss=2 + step / 500)

    def collapsing(step: int, row: Row) -> None:
        row["loss"] = 3.0 if step < 10 else 0.1

    flat, learned = held(3.0, 2.99, 2.0), held(3.0, 0.3, 0.3)
    assert rules(stream(clipped)) == {"always-clipped": (40, "warn")}
    assert rules(stream(unsteady)) == {"unsteady": (40, "warn")}
    assert rules(stream(climbing)) == {"norm-climbs": (40, "warn")}
    assert rules(stream(climbing_while_the_loss_rises)) == {}
    assert rules(stream(collapsing, flat)) == {"memorising": (50, "warn")}
    assert rules(stream(collapsing, learned)) == {}
    forgot = held(3.0, 2.0, 1.9, 1.8, general=[2.0, 2.05, 2.11, 2.3])
    assert rules(stream(evaluations=forgot)) == {"forgetting": (100, "warn")}


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e9])
def test_a_low_or_a_high_norm_alone_changes_no_verdict(scale: float) -> None:
    def scaled(step: int, row: Row) -> None:
        row["grad_norm"] *= scale

    evaluations = held(3.0, 2.0, 1.5)
    assert rules(stream(scaled, evaluations)) == rules(stream(evaluations=evaluations)) == {}


def test_noise_is_reported_when_the_step_measures_a_micro_batch() -> None:
    def with_micro(step: int, row: Row) -> None:
        row.update(grad_norm=2.0, micro_norm=3.0, micro_size=2, batch_size=8)

    numbers = verdicts(stream(with_micro))[0][1].numbers
    assert numbers["true_norm_squared"] == pytest.approx((8 * 4 - 2 * 9) / 6)
    assert numbers["noise"] == pytest.approx((9 - 4) / (1 / 2 - 1 / 8))
    assert numbers["noise_batch"] == pytest.approx(numbers["noise"] / numbers["true_norm_squared"])
    assert verdicts(stream())[0][1].numbers["noise_batch"] is None


def eventful() -> list[Look]:
    def change(step: int, row: Row) -> None:
        row["clipped"] = 1.0
        row["loss"] = 3.0 if step < 10 else 0.1 if step < 60 else 3 + 0.1 * (step - 60)

    return stream(change, held(3.0, 3.1, 3.2, 3.3, 3.4, general=[2.0, 2.01, 2.02, 2.5, 2.6]))


def test_replaying_a_stored_stream_gives_the_same_verdicts() -> None:
    looks = eventful()
    said = verdicts(looks)
    assert {signal.rule for _, signal in said} >= {
        "memorising",
        "runaway",
        "forgetting",
        "nothing-gained",
        "always-clipped",
    }
    stored = json.loads(json.dumps([vars_of(look) for look in looks]))
    assert verdicts([Look(**item) for item in stored]) == said


def vars_of(look: Look) -> dict[str, Any]:
    names = ("step", "samples", "planned_samples", "planned_steps", "row", "evaluation", "warmup_steps")
    return {name: getattr(look, name) for name in names}


@pytest.mark.parametrize("cut", [0, 1, 7, 39, 41, 42, 53, 119, 121, 125, 300])
def test_an_interruption_changes_no_verdict(cut: int) -> None:
    looks = eventful()
    first, second = (EarlyDynamics(EarlyDynamicsStopping.Params()) for _ in range(2))
    said = [(look.step, signal) for look in looks[:cut] for signal in first.see(look)]
    state = first.state_dict()
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    second.load_state_dict({**tensors, **json.loads(json.dumps(rest, allow_nan=False))})
    said += [(look.step, signal) for look in looks[cut:] for signal in second.see(look)]
    assert said == verdicts(looks)


def test_messages_are_sentences_and_numbers_are_json() -> None:
    for _, signal in verdicts(eventful()):
        assert signal.message.endswith(".") and not signal.message[0].islower()
        assert json.dumps(signal.numbers, allow_nan=False)


def test_a_short_run_is_not_judged_by_its_windows() -> None:
    assert rules(stream(steps=30)) == {} and verdicts(stream(steps=12)) == []


def test_a_second_look_that_ends_before_the_first_is_refused() -> None:
    (fault,) = EarlyDynamicsStopping.check(EarlyDynamicsStopping.Params(first_window=0.3, second_window=0.2), None)  # type: ignore[arg-type]
    assert fault.where == "second_window" and "0.3" in fault.way_out


def test_the_monitor_costs_far_less_than_a_step() -> None:
    """A thousandth of a second per step would already be one per cent of a tenth of a second."""
    import time

    looks = stream(steps=4000)
    watcher = EarlyDynamics(EarlyDynamicsStopping.Params())
    start = time.perf_counter()
    for look in looks:
        list(watcher.see(look))
    assert (time.perf_counter() - start) / len(looks) < 1e-3
