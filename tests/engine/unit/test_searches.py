"""Searches over independent trials: what is tried, when it ends, what is decided again after an interruption, and what the report says."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import EngineError
from engine.core.method import SearchMethod
from engine.core.overrides import KeepOrStop, Override
from engine.core.recipe import Recipe, parse_recipe
from engine.core.registry import catalogue
from engine.core.space import Knob
from engine.core.work import Ask, Mark, Trial
from engine.ops import search
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.ops.search import SearchContext
from engine.parts import trials as shared
from tests.engine.tiny import Tiny, events, lay

RATE, BATCH = "settings.learning_rate", "settings.batch_size"
PLAIN = {
    "task": "causal_lm", "model": {"source": "starter:x"}, "data": {"source": "starter:y"}, "methods": [{"slug": "lora"}],
    "settings": {"learning_rate": 1e-2, "batch_size": 8},
}  # fmt: skip
Shown = Callable[[dict[str, Any], int], dict[str, Any]]


def method(slug: str, seed: int = 1, steps: int = 100, **params: Any) -> SearchMethod:
    """A search that has begun, over runs of so many steps."""
    found = catalogue()[slug]
    made: SearchMethod = found(found.Params.model_validate(params))
    rng = random.Random(seed)
    made.begin(SearchContext(recipe=parse_recipe(PLAIN), total_steps=steps, rng=rng, steps_of=lambda values: steps))
    return made


def play(
    made: SearchMethod,
    shown: Shown,
    *,
    seconds: float = 60.0,
    failing: Mapping[int, int] | None = None,
    said: Mapping[int, tuple[int, KeepOrStop]] | None = None,
) -> tuple[dict[int, Trial], list[Ask]]:
    """Drive a search without training: `shown(values, step)` is what a slice shows; every slice takes `seconds`; failing: trial -> step it cannot pass;
    said: number of slices behind which a person decides -> (trial, verdict)."""
    trials: dict[int, Trial] = {}
    asked: list[Ask] = []
    elapsed = 0.0
    while found := made.ask(list(trials.values())):
        assert len(asked) < 500
        for ask in found:
            trial = trials.setdefault(ask.trial, Trial(number=ask.trial))
            trial.values, elapsed = dict(ask.values), elapsed + seconds
            asked.append(ask)
            if ask.until > (failing or {}).get(ask.trial, 10**9):
                trial.failed = "The loss became infinite."
                trial.marks.append(Mark(step=ask.until, score=-math.inf, values=dict(ask.values), elapsed=elapsed))
            else:
                numbers = {
                    "samples": 8 * ask.until,
                    "planned_samples": 800,
                    "total_steps": 100,
                    "group": "g",
                    **shown(ask.values, ask.until),
                }
                trial.marks.append(Mark(step=ask.until, values=dict(ask.values), elapsed=elapsed, **numbers))
            if said and len(asked) in said:
                number, verdict = said[len(asked)]
                trials[number].override = Override(number=len(asked), trial=number, verdict=verdict, by="ada")
                made.heed(trials[number])
            made.tell(trial)
    return trials, asked


def hill(values: dict[str, Any], step: int) -> dict[str, Any]:
    """The best rate is 1e-3; small rates have small norms and high losses."""
    miss = abs(math.log10(values[RATE]) + 3)
    loss = 1.0 + miss + 1.0 / step
    return {
        "score": -loss,
        "heldout": {"eval_loss": loss, "general_loss": 2.0},
        "early": {"norm": values[RATE], "loss": 3.0 - values[RATE]},
    }


# ── what is tried ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_levels_go_from_end_to_end_in_factors_where_the_range_is_wide() -> None:
    assert shared.levels(Knob(name="a.b", low=1e-5, high=1e-1), 5) == pytest.approx((1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    assert shared.levels(Knob(name="a.b", low=0.0, high=0.4), 3) == pytest.approx((0.0, 0.2, 0.4))
    assert shared.levels(Knob(name="a.b", low=1, high=3, whole=True), 9) == (1, 2, 3)
    assert shared.levels(Knob(name="a.b", low=1, high=4, choices=(4, 1)), 7) == (4, 1)
    assert shared.levels(Knob(name="a.b", low=1e-4, high=1e-2), 1) == pytest.approx((1e-3,))


def test_a_grid_tries_every_combination_once_in_an_order_of_the_seed() -> None:
    space = "learning_rate=1e-4..1e-2, batch_size=4|8"
    trials, _ = play(method("grid-search", space=space, points=3), hill)
    tried = [(trial.values[RATE], trial.values[BATCH]) for trial in trials.values()]
    assert len(tried) == len(set(tried)) == 6 and {batch for _, batch in tried} == {4, 8}
    other, _ = play(method("grid-search", seed=2, space=space, points=3), hill)
    again, _ = play(method("grid-search", space=space, points=3), hill)
    assert (
        [t.values for t in again.values()] == [t.values for t in trials.values()] != [t.values for t in other.values()]
    )


def test_draws_differ_and_stop_where_a_small_space_is_used_up() -> None:
    trials, _ = play(method("random-search", space="learning_rate=1e-4|1e-3, batch_size=4|8", trials=12), hill)
    assert len(trials) == 4


def test_a_model_of_the_trials_asks_near_the_best_and_asks_the_same_again() -> None:
    def tries(sampler: str) -> list[float]:
        made = method("tpe-search", space="learning_rate=1e-6..1e0", trials=20, sampler=sampler)
        return [t.values[RATE] for t in play(made, hill)[0].values()]

    for sampler in ("tpe", "gp"):
        first = tries(sampler)
        assert first == tries(sampler)
        miss = [abs(math.log10(rate) + 3) for rate in first]
        assert sum(miss[6:]) / 14 < 0.75 * sum(miss[:6]) / 6, f"{sampler} learned nothing: {miss}"


def test_a_trial_that_breaks_down_is_told_as_failed_and_never_wins() -> None:
    made = method("tpe-search", space="learning_rate=1e-6..1e0", trials=8)
    trials, _ = play(made, hill, failing={0: 10, 7: 10})
    assert made.winner(list(trials.values())) not in {0, 7} and len(trials) == 8
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    assert [row["state"] for row in report.table].count("failed") == 2


def test_when_all_break_down_a_sentence_says_so() -> None:
    made = method("random-search", space="learning_rate=1e-6..1e0", trials=3)
    trials, _ = play(made, hill, failing=dict.fromkeys(range(3), 1))
    with pytest.raises(EngineError, match="Every trial broke down"):
        made.winner(list(trials.values()))


@pytest.mark.parametrize("slug", ["grid-search", "random-search", "tpe-search", "successive-halving"])
def test_no_trial_begins_when_the_minutes_are_used_up(slug: str) -> None:
    made = method(slug, space="learning_rate=1e-6|1e-5|1e-4|1e-3|1e-2|1e-1|1", max_minutes=3.0)
    trials, asked = play(made, hill, seconds=61.0)
    assert len(asked) == 3, "the third slice ends behind the third minute"
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    assert report.numbers["trials"] == 3 and any("did not begin" in note for note in report.notes)


def test_too_many_combinations_are_refused(tiny: Tiny) -> None:
    body = {**tiny.inputs("causal_lm"), "operation": "search", "settings": {"max_steps": 4}}
    space = "learning_rate=1e-4..1e-1, batch_size=1..64, adamw.weight_decay=0..0.3"
    leads = [{"slug": "grid-search", "params": {"space": space, "points": 9}}, {"slug": "lora"}, {"slug": "adamw"}]
    faults = check(parse_recipe({**body, "methods": leads})).faults
    assert [fault.code for fault in faults] == ["too_many"] and "729" in faults[0].what


# ── what the report says ──────────────────────────────────────────────────────────────────────────────────────────────


def test_importance_finds_the_setting_that_matters_and_is_silent_for_few_trials() -> None:
    made = method("random-search", space="learning_rate=1e-5..1e-1, lora.dropout=0..0.5", trials=24)
    trials, _ = play(made, hill)
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    weights = report.numbers["importance"]
    assert weights[RATE] > 0.8 and sum(weights.values()) == pytest.approx(1.0, abs=1e-3)
    assert report.knobs == (RATE, "lora.dropout") and report.score == "score"
    assert {*report.knobs, "score", "state", "trial"} <= report.table[0].keys()
    assert report.numbers["share of all examples"] == 1.0
    few, _ = play(method("random-search", space="learning_rate=1e-5..1e-1", trials=5), hill)
    assert shared.importance([shared.row_of(t, made.knobs[:1], "finished") for t in few.values()], made.knobs[:1]) == {}  # type: ignore[attr-defined]


# ── halving ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TWELVE = "learning_rate=" + "|".join(f"{10 ** (-6 + n / 2):.3g}" for n in range(12))


def halved(**params: Any) -> SearchMethod:
    return method("successive-halving", space=TWELVE, values="grid", **{"rerun": 0.0, **params})


def test_twelve_four_two_and_the_report_has_every_decision() -> None:
    made = halved()
    trials, asked = play(made, hill)
    assert [sum(a.until == until for a in asked) for until in (10, 30, 100)] == [12, 4, 2]
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    decisions = report.numbers["decisions"]
    assert len(decisions) == 16 and {d["group_size"] for d in decisions} == {12, 4}
    assert report.numbers["saved examples"] == 8 * 720 + 2 * 560
    assert report.numbers["share of all examples"] == pytest.approx(0.2833, abs=1e-3)
    assert [row["state"] for row in report.table].count("stopped") == 10
    assert sum(row["at 10%"] == "goes on" for row in report.table) == 4 and report.numbers["importance"]
    by = {d["by"] for d in decisions if d["goes_on"]}
    assert by == {"held-out", "dynamics"}
    states = {made.standing(trial)[0] for trial in trials.values()}
    assert states == {"stopped", "finished"}
    assert all(made.standing(trial)[1].endswith(".") for trial in trials.values())


def test_early_signals_and_held_out_loss_choose_different_runs() -> None:
    chosen = {}
    for quota, goal in ((0.0, "learn"), (1.0, "both")):
        trials, asked = play(halved(quota=quota, goal=goal), hill)
        chosen[quota] = sorted(trials[a.trial].values[RATE] for a in asked if a.until == 30)
    assert len(chosen[0.0]) == 4 and chosen[0.0][0] > 0.99e-4 and chosen[0.0][-1] < 1.01e-2, "around the best rate"
    assert chosen[1.0] == pytest.approx([1e-6, 10**-5.5, 1e-5, 10**-4.5], rel=0.01)


def test_fewer_than_six_are_only_ranked() -> None:
    made = method("successive-halving", space="learning_rate=1e-4|1e-3|1e-2|1e-1", values="grid")
    trials, asked = play(made, hill)
    assert sum(a.until == 100 for a in asked) == 4
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    assert "fewer than six" in report.sentence and all(d["goes_on"] for d in report.numbers["decisions"])


def test_a_survivor_that_breaks_down_gives_its_seat_to_the_next() -> None:
    plain, _ = play(halved(), hill)
    winner = halved().winner(list(plain.values()))
    made = halved()
    trials, asked = play(made, hill, failing={winner: 30})
    ended = [a.trial for a in asked if a.until == 100]
    assert len(ended) == 3 and winner in ended
    revived = [
        d
        for d in made.report(list(trials.values()), made.winner(list(trials.values()))).numbers["decisions"]
        if d["by"] == "revived"
    ]
    assert len(revived) == 1 and revived[0]["trial"] in ended


def test_named_runs_are_never_stopped_and_one_in_ten_of_the_stopped_is_checked() -> None:
    trials, asked = play(halved(), hill)
    worst = min(trials.values(), key=lambda t: (t.step, t.score)).number
    _, kept = play(halved(keep=f"{worst}, 99"), hill)
    assert [a.until for a in kept if a.trial == worst] == [10, 30, 100]
    made = halved(rerun=0.1)
    trials, asked = play(made, hill)
    assert sum(a.until == 100 for a in asked) == 3
    numbers = made.report(list(trials.values()), made.winner(list(trials.values()))).numbers
    assert len(numbers["checked"]) == 1 and numbers["stopped runs that came out better"] == 0


def test_watching_only_stops_nobody_and_says_what_it_would_have_cost() -> None:
    made = halved(shadow=True)
    trials, _ = play(made, hill)
    assert all(trial.step == 100 for trial in trials.values())
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    n = report.numbers
    assert n["regret"] == 0.0 and n["best run stopped at the first look"] is False
    assert n["share of examples it would have saved"] == pytest.approx(1 - 0.2833, abs=1e-3)
    told = n["correlations"]["first look, group A"]
    assert set(told) == {"lower norm", "higher training loss", "dynamics", "held-out loss"}
    assert told["held-out loss"]["correlation"] == pytest.approx(1.0) and told["held-out loss"]["low"] > 0.9
    assert told["dynamics"]["low"] < 0 < told["dynamics"]["high"]
    assert any("switch them off" in note for note in report.notes)


def test_the_asynchronous_form_promotes_as_it_goes_and_ends() -> None:
    made = halved(asynchronous=True)
    trials, asked = play(made, hill)
    order = [a.until for a in asked]
    assert order[:6] == [10] * 6 and order[6] == 30, "six have reached the rung, and the best of them goes on at once"
    assert [order.count(until) for until in (10, 30, 100)] == [12, 4, 2]
    report = made.report(list(trials.values()), made.winner(list(trials.values())))
    assert {d["trial"] for d in report.numbers["decisions"] if d["rung"] == 0.1} == set(range(12))
    assert 0 < report.numbers["share of all examples"] < 0.3
    few = method("successive-halving", space="learning_rate=1e-4|1e-3|1e-2", values="grid", asynchronous=True)
    assert sum(a.until == 100 for a in play(few, hill)[1]) == 3


def test_stopped_runs_go_on_while_minutes_are_left() -> None:
    _, asked = play(halved(revive=True, max_minutes=20.5), hill)
    assert len(asked) == 21 and sum(a.until == 100 for a in asked) == 5


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"first_rung": 0.5}, "rungs_crossed"),
        ({"quota": 1.0}, "quota_against_goal"),
        ({"quota": 0.0, "goal": "both"}, "quota_against_goal"),
        ({"asynchronous": True, "shadow": True}, "not_together"),
        ({"keep": "first"}, "bad_numbers"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny: Tiny, params: dict[str, Any], code: str) -> None:
    faults = check(real(tiny, "successive-halving", params)).faults
    assert [fault.code for fault in faults] == [code] and faults[0].why and faults[0].way_out


# ── real trainings ────────────────────────────────────────────────────────────────────────────────────────────────────


def real(tiny: Tiny, slug: str, params: dict[str, Any], **settings: Any) -> Recipe:
    plan = {
        "epochs": 2,
        "batch_size": 4,
        "max_length": 48,
        "learning_rate": 1e-2,
        "evaluations": 1,
        "precision": "fp32",
        "packing": False,
        **settings,
    }
    leads = [{"slug": slug, "params": params}, {"slug": "full-finetuning"}, {"slug": "clip"}]
    return parse_recipe({**tiny.inputs("causal_lm"), "operation": "search", "methods": leads, "settings": plan})


def test_batch_sizes_pause_at_the_same_share_and_clip_values_are_no_neighbours(tiny: Tiny, tmp_path: Path) -> None:
    space = "batch_size=2|4, clip.max_norm=0.5|1.0"
    params = {"space": space, "values": "grid", "first_rung": 0.3, "second_rung": 0.6}
    folder = lay(tmp_path, require(real(tiny, "successive-halving", params)).recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    lines = [json.loads(line) for line in (folder / search.RECORD).read_text().splitlines()]
    first = {line["ask"]["trial"]: line for line in reversed(lines)}
    by_batch = {line["ask"]["values"][BATCH]: line for line in first.values()}
    assert by_batch[2]["ask"]["until"] == pytest.approx(2 * by_batch[4]["ask"]["until"], abs=1)
    groups = {
        (line["ask"]["values"][BATCH], line["ask"]["values"]["clip.max_norm"]): line["numbers"]["group"]
        for line in lines
    }
    assert groups[2, 0.5] == groups[4, 0.5] != groups[2, 1.0] == groups[4, 1.0]
    assert all(
        line["numbers"]["early"]["norm"] > 0 and line["numbers"]["heldout"]["general_loss"] > 0 for line in lines
    )
    told = events(folder, "trial")
    assert {event["state"] for event in told} >= {"running", "waiting", "finished"}
    assert told[0]["values"].keys() == {BATCH, "clip.max_norm"} and told[0]["total"] > 0


def test_a_search_that_was_killed_decides_the_same_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"space": "learning_rate=1e-4..1e-1", "trials": 6, "first_rung": 0.3, "second_rung": 0.6, "rerun": 0.25}
    recipe = require(real(tiny, "successive-halving", params)).recipe
    whole = lay(tmp_path / "whole", recipe)
    assert run_folder(whole)["outcome"] == "succeeded"
    folder = lay(tmp_path / "killed", recipe)
    inner, count = search.train, 0

    def dying(run: Any) -> Any:
        nonlocal count
        count += 1
        if count in {4, 9}:
            raise KeyboardInterrupt
        return inner(run)

    monkeypatch.setattr(search, "train", dying)
    for _ in range(3):
        try:
            run_folder(folder)
            break
        except KeyboardInterrupt:
            continue
    said = [json.loads((place / "artifact" / "artifact.json").read_text())["report"] for place in (whole, folder)]
    assert count > 9 and said[0]["numbers"] == said[1]["numbers"] and said[0]["table"] == said[1]["table"]
    told = [[{k: v for k, v in e.items() if k != "key"} for e in events(place, "trial")] for place in (whole, folder)]
    assert told[0] == told[1], "nothing is told twice"
