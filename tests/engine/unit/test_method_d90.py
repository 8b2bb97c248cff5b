"""d90: its arithmetic by hand, its plan played with made-up results, and one whole flow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core.control import write_request
from engine.core.errors import EngineError
from engine.core.recipe import Recipe, parse_recipe
from engine.core.work import Outcome, Step, StepResult
from engine.io.facts import model_facts
from engine.methods.d90 import D90, between, grid, multiples
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.tasks import task as task_named
from tests.engine.attached import facts_for
from tests.engine.tiny import Tiny, lay

Play = tuple[Outcome, list[Recipe], list[str]]


def play(
    params: dict[str, Any],
    score: Callable[[dict[str, Any], float], float | None],
    *,
    full: float = 0.9,
    start: float = 0.5,
    task: str = "classify",
    methods: tuple[str, ...] = (),
) -> Play:
    """Play the plan with scores from a function of (parameters of the subspace, learning rate). Returns outcome, recipes and forgotten steps."""
    recipe = parse_recipe({"operation": "flow", "task": task, "model": {"source": "folder:/none"}, "data": {"source": "file:/none"},
                           "methods": [{"slug": "d90", "params": params}], "settings": {"learning_rate": 1e-4}})  # fmt: skip
    forgotten: list[str] = []
    asked: list[Recipe] = []

    def train(methods: list[tuple[str, dict[str, Any]]], **settings: Any) -> Recipe:
        refs = [{"slug": slug, "params": dict(own)} for slug, own in methods]
        body = {**recipe.model_dump(), "operation": "train", "methods": refs}
        return parse_recipe({**body, "settings": {**body["settings"], **settings}})

    inner = parse_recipe({**recipe.model_dump(), "operation": "train", "methods": [{"slug": slug} for slug in methods]})
    ctx = SimpleNamespace(
        task=task_named(task), seed=17, inner=inner, train=train, note=lambda *words: None,
        forget=lambda result: forgotten.append(result.name),
        facts=SimpleNamespace(model=SimpleNamespace(num_parameters=1000)),
    )  # fmt: skip

    def scores(value: float) -> dict[str, float]:
        return {"eval_accuracy": value, "eval_loss": 1.0} if task == "classify" else {"eval_loss": value}

    plan, answer = D90(D90.Params(**params)).plan(ctx), None
    while True:
        try:
            step = plan.send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            return end.value, asked, forgotten
        assert isinstance(step, Step)
        asked.append(step.recipe)
        lead = next((ref for ref in step.recipe.methods if ref.slug == "said"), None)
        value = full if lead is None else score(lead.params, float(step.recipe.settings.learning_rate or 0))
        body = {"before": scores(start), "data": {"num_train": 200}, "metrics": scores(value or 0.0)}
        answer = StepResult(name=step.name, folder=Path("/none"), outcome="failed" if value is None else "succeeded", message="",
                            description=body)  # fmt: skip


def sizes(asked: list[Recipe]) -> list[int]:
    return [ref.params["d"] for recipe in asked for ref in recipe.methods if ref.slug == "said"]


# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_grid_has_equal_factors_and_both_ends() -> None:
    assert grid(10, 10_000, 4) == [10, 100, 1000, 10_000]
    assert grid(10, 1000, 5) == [10, 32, 100, 316, 1000]
    assert grid(2, 4, 10) == [2, 3, 4]


def test_learning_rates_are_read_or_refused() -> None:
    assert multiples("1, 3") == (1.0, 3.0) and multiples("0.5") == (0.5,)
    for bad in ("", "a", "1, -1", "0", "1;2", "nan", "inf"):
        assert multiples(bad) == ()


def test_the_middle_lies_between_the_last_miss_and_the_first_hit() -> None:
    points = [SimpleNamespace(d=10, score=0.1), SimpleNamespace(d=100, score=0.5), SimpleNamespace(d=1000, score=0.9)]
    assert between(points, 0.8) == 316  # type: ignore[arg-type]
    assert between(points, 0.05) is None and between(points, 0.95) is None  # type: ignore[arg-type]
    assert between([SimpleNamespace(d=10, score=0.1), SimpleNamespace(d=11, score=0.9)], 0.5) is None  # type: ignore[arg-type, list-item]


# ── the plan ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rising(params: dict[str, Any], rate: float) -> float:
    """A made-up curve: 90 % of 0.9 = 0.81 is crossed just above d = 400."""
    return min(0.9, 0.81 * (params["d"] / 400) ** 0.2)


def test_it_stops_at_the_first_count_that_is_good_enough() -> None:
    outcome, asked, forgotten = play({"low": 10, "high": 10_000, "count": 4, "rates": "1"}, rising)
    assert [ref.slug for ref in asked[0].methods] == ["full-finetuning"] and sizes(asked) == [10, 100, 1000]
    report = outcome.report
    assert report is not None and report.numbers["d90"] == 1000 and report.numbers["target"] == pytest.approx(0.81)
    assert outcome.take is not None and outcome.take.name.startswith("d1000-")
    assert "1,000 numbers (SAID) are enough for 90%" in report.sentence and report.sentence == outcome.message
    assert [row["good enough"] for row in report.table] == [False, False, True] and report.curve == ("d", "score")
    assert report.table[1]["share"] == pytest.approx(rising({"d": 100}, 0) / 0.9)
    assert outcome.take.name not in forgotten and "full" in forgotten and len(set(forgotten)) == 3
    assert report.numbers["bound"] == pytest.approx((1000 / 200) ** 0.5, abs=1e-3)


def test_the_whole_curve_goes_on_and_takes_the_smallest_hit_home() -> None:
    outcome, asked, _ = play({"low": 10, "high": 10_000, "count": 4, "rates": "1", "whole_curve": True}, rising)
    assert sizes(asked) == [10, 100, 1000, 10_000]
    assert outcome.report is not None and outcome.report.numbers["d90"] == 1000
    assert outcome.take is not None and outcome.take.name.startswith("d1000-")


def test_closer_looks_close_in_on_the_crossing() -> None:
    outcome, asked, forgotten = play({"low": 10, "high": 10_000, "count": 4, "rates": "1", "refine": 6}, rising)
    assert sizes(asked)[:4] == [10, 100, 1000, 316] and outcome.report is not None
    assert 400 <= outcome.report.numbers["d90"] <= 410
    assert outcome.take is not None and outcome.take.name not in forgotten
    assert [row["d"] for row in outcome.report.table] == sorted(set(sizes(asked)))


def test_rates_and_seeds_are_tried_and_averaged() -> None:
    def score(params: dict[str, Any], rate: float) -> float:
        base = 0.8 if params["map_seed"] == 17 else 0.6
        return base + (0.05 if rate > 0.3 / params["d"] ** 0.5 * 2 else 0.0)

    outcome, asked, _ = play({"low": 10, "high": 100, "count": 2, "rates": "1, 3", "seeds": 2}, score)
    assert len(asked) == 1 + 2 * 2 * 2
    report = outcome.report
    assert report is not None and report.numbers["d90"] is None
    assert report.table[0]["score"] == pytest.approx((0.85 + 0.65) / 2) and report.table[0]["runs"] == 2
    assert report.table[0]["spread"] == pytest.approx(0.2 / 2**0.5)
    assert outcome.take is not None and "map1" in outcome.take.name
    assert "No count up to 100" in report.sentence


def test_a_seed_that_is_good_enough_needs_no_further_rate() -> None:
    _, asked, _ = play({"low": 10, "high": 100, "count": 2, "rates": "1, 3"}, lambda params, rate: 0.9)
    assert sizes(asked) == [10]
    _, asked, _ = play(
        {"low": 10, "high": 100, "count": 2, "rates": "1, 3", "whole_curve": True}, lambda params, rate: 0.9
    )
    assert sizes(asked) == [10, 10, 100, 100]


def test_a_diverged_run_is_a_miss_and_no_end() -> None:
    outcome, asked, _ = play(
        {"low": 10, "high": 1000, "count": 3, "rates": "1"}, lambda params, rate: None if params["d"] < 1000 else 0.9
    )
    report = outcome.report
    assert sizes(asked) == [10, 100, 1000] and report is not None and report.numbers["d90"] == 1000
    assert any("diverged" in note for note in report.notes)
    with pytest.raises(EngineError, match="diverged"):
        play({"low": 10, "high": 1000, "count": 2, "rates": "1"}, lambda params, rate: None)


def test_a_loss_is_measured_by_its_gain_over_the_untouched_model() -> None:
    def loss(params: dict[str, Any], rate: float) -> float:
        return 3.25 if params["d"] < 100 else 3.15

    outcome, asked, _ = play(
        {"low": 10, "high": 1000, "count": 3, "rates": "1"}, loss, task="causal_lm", full=3.0, start=5.0
    )
    report = outcome.report
    assert (
        report is not None and report.numbers["d90"] == 100 and sizes(asked) == [10, 100]
    )  # the target is a loss of 3.2
    assert report.numbers["target"] == pytest.approx(-3.2) and report.table[0]["share"] == pytest.approx(1.75 / 2)
    assert "a loss of 3.150" in report.sentence and "gains over the untouched model" in report.sentence
    with pytest.raises(EngineError, match="share of a loss"):
        play({"low": 10, "high": 1000, "measure": "score"}, loss, task="causal_lm", full=3.0, start=5.0)


def test_a_share_of_the_gain_for_right_answers() -> None:
    outcome, _, _ = play({"low": 10, "high": 10_000, "count": 4, "rates": "1", "measure": "gain"}, rising)
    assert outcome.report is not None and outcome.report.numbers["target"] == pytest.approx(0.5 + 0.9 * 0.4)


def test_a_full_training_without_gain_is_refused() -> None:
    with pytest.raises(EngineError) as refused:
        play({"low": 10, "high": 100}, rising, full=0.5, start=0.5)
    assert refused.value.fault.code == "no_gain" and refused.value.fault.way_out.endswith(".")


def test_other_methods_of_the_recipe_stay_beside_the_subspace() -> None:
    _, asked, _ = play({"low": 10, "high": 100, "count": 2, "rates": "1"}, rising, methods=("lora", "clip", "cosine"))
    assert [ref.slug for ref in asked[0].methods] == ["lora", "clip", "cosine"]  # what the counts are compared with
    assert [ref.slug for ref in asked[1].methods] == ["said", "clip", "cosine"]
    assert asked[0].settings.learning_rate == 1e-4 and asked[1].settings.learning_rate == pytest.approx(
        0.3 / 10**0.5, rel=0.1
    )
    assert {recipe.settings.seed for recipe in asked} == {17}  # data and split stay


# ── before anything runs ──────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_plans_are_refused_early(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")

    def codes(**params: Any) -> list[tuple[str, str]]:
        return [(fault.where, fault.code) for fault in D90.check(D90.Params(**params), facts)]

    assert codes() == []
    assert codes(low=100, high=100) == [("low", "empty_range")]
    assert codes(rates="fast") == [("rates", "not_a_number")]
    assert codes(low=3) == [("low", "too_small")] and codes(low=3, mode="did") == []
    assert codes(high=500_000) == [("high", "too_large")]
    assert codes(targets="q_porj") == [("targets", "no_such_layer")]
    assert D90.num_runs(D90.Params(count=5, seeds=2, rates="1, 3", refine=1), facts) == 1 + 6 * 2 * 2


def flow(tiny: Tiny, task: str, methods: list[tuple[str, dict[str, Any]]], **settings: Any) -> Recipe:
    plan = {
        "epochs": 2,
        "max_steps": 6,
        "batch_size": 4,
        "max_length": 48,
        "evaluations": 2,
        "precision": "fp32",
        **settings,
    }
    refs = [{"slug": slug, "params": params} for slug, params in methods]
    return parse_recipe({**tiny.inputs(task), "operation": "flow", "methods": refs, "settings": plan})


def test_the_estimate_counts_every_training(tiny: Tiny) -> None:
    checked = require(flow(tiny, "classify", [("d90", {"low": 10, "high": 100, "count": 2, "rates": "1"})]))
    assert checked.estimate["total_steps"] == 3 * 6
    assert checked.recipe.settings.learning_rate is not None
    faults = check(flow(tiny, "classify", [("d90", {}), ("clip", {})])).faults
    assert faults and all(
        fault.why and fault.way_out for fault in faults
    )  # beside clip something must learn in the full training


# ── a whole flow ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_flow_can_be_left_and_taken_up_again(tiny: Tiny, tmp_path: Path) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [
        ("full-finetuning", {}),
        ("d90", {"low": 10, "high": 100, "count": 2, "rates": "1", "whole_curve": True, "measure": "gain"}),
        ("clip", {}),
    ]
    recipe = require(flow(tiny, "causal_lm", methods, learning_rate=5e-3)).recipe
    whole = lay(tmp_path / "whole", recipe)
    assert run_folder(whole)["outcome"] == "succeeded"
    left = lay(tmp_path / "left", recipe)
    write_request(left, "pause")
    assert run_folder(left)["outcome"] == "paused"
    (left / "control.json").unlink()
    assert run_folder(left)["outcome"] == "succeeded"
    bodies = [json.loads((folder / "artifact" / "artifact.json").read_text()) for folder in (whole, left)]
    assert bodies[0]["report"] == bodies[1]["report"]
    body = bodies[0]
    assert [row["d"] for row in body["report"]["table"]] == [10, 100]
    assert {"adapter", "merged"} <= body["forms"].keys() and body["num_trainable"] in {10, 100}
    assert [m["slug"] for m in body["methods"]][:2] == ["d90", "said"]
    assert json.loads((whole / "artifact" / "certificate.json").read_text())["ok"]
    kept = list((whole / "steps").glob("*/artifact/merged"))
    assert len(kept) == 1  # only the run that went home keeps its weights
