"""The rule of successive halving as pure functions: ranks, comparable groups, seats, asynchronous promotion, and the check of the rule."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from engine.parts import halving
from engine.parts.halving import DYNAMICS, HELDOUT, Rule, Standing, select

finite = st.floats(0.01, 100, allow_nan=False)


def standing(trial: int, group: str = "A", **seen: Any) -> Standing:
    return Standing(trial=trial, group=group, **{"norm": 1.0, "loss": 1.0, "target": 1.0, "general": 1.0, **seen})


@st.composite
def crowds(draw: st.DrawFn, least: int = 1, most: int = 16) -> list[Standing]:
    count = draw(st.integers(least, most))
    return [
        standing(
            n,
            draw(st.sampled_from("AB")),
            **{name: draw(finite) for name in ("norm", "loss", "target", "general")},
            alive=draw(st.booleans()) or n % 3 > 0,
        )
        for n in range(count)
    ]


@given(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=20))
def test_ranks_are_those_of_scipy(values: list[float]) -> None:
    assert halving.average_ranks(values) == rankdata(values).tolist()
    assert halving.average_ranks(values, descending=True) == rankdata([-v for v in values]).tolist()


def test_what_was_not_measured_has_no_rank_and_moves_nobody() -> None:
    assert halving.average_ranks([3.0, math.nan, 1.0])[::2] == [2.0, 1.0]
    assert math.isnan(halving.average_ranks([3.0, math.nan, 1.0])[1])


def test_small_norm_and_high_loss_stand_in_front_and_the_goal_says_which_loss_counts() -> None:
    crowd = [
        standing(0, norm=1, loss=9, target=5, general=1),
        standing(1, norm=5, loss=5, target=1, general=9),
        standing(2, norm=9, loss=1, target=3, general=1),
    ]
    learn, both = halving.ranks_of(crowd, "learn"), halving.ranks_of(crowd, "both")
    assert [learn[n].dynamics for n in range(3)] == [2.0, 4.0, 6.0], "rank(g ascending) + rank(L descending)"
    assert [learn[n].heldout_place for n in range(3)] == [3.0, 1.0, 2.0]
    assert [both[n].heldout for n in range(3)] == [6.0, 10.0, 4.0]
    assert [both[n].heldout_place for n in range(3)] == [2.0, 3.0, 1.0]


@given(crowds(least=6), st.floats(1e-3, 1e3), st.floats(0, 1))
def test_norm_and_loss_are_never_compared_across_groups(crowd: list[Standing], factor: float, quota: float) -> None:
    """All norms and training losses of one group times a number: nothing changes."""
    rule = Rule(quota=quota, least=2)
    moved = [
        Standing(trial=s.trial, group=s.group, norm=s.norm * factor, loss=s.loss * factor, target=s.target, general=s.general, alive=s.alive)
        if s.group == "B" else s
        for s in crowd
    ]  # fmt: skip
    a, b = select(crowd, rule), select(moved, rule)
    assert a.order == b.order and a.by == b.by


def test_a_small_group_has_no_say_by_early_signals() -> None:
    crowd = [standing(n, "A", norm=n + 1.0, target=10.0 - n) for n in range(6)]
    crowd += [standing(n, "B", norm=0.001, loss=99.0, target=20.0 + n) for n in range(6, 9)]
    chosen = select(crowd, Rule(quota=1.0, least=6))
    assert chosen.order[0] == 0 and {trial for trial, by in chosen.by.items() if by == DYNAMICS} == set(range(6))


@given(crowds(), st.floats(0, 1), st.floats(1, 6))
def test_every_living_run_is_ordered_once_and_the_dead_take_no_seat(
    crowd: list[Standing], quota: float, eta: float
) -> None:
    chosen = select(crowd, Rule(quota=quota, eta=eta))
    alive = {s.trial for s in crowd if s.alive}
    assert sorted(chosen.order) == sorted(alive)
    going = chosen.going()
    if len(crowd) < 6:
        assert set(going) == alive, "fewer than six: only ranked"
    else:
        assert len(going) == min(len(alive), max(1, math.floor(len(crowd) / eta + 0.5)))


@given(st.permutations(range(9)), st.permutations(range(9)), st.floats(0, 1))
def test_seats_follow_the_quota_at_every_length(heldout: list[int], dynamics: list[int], quota: float) -> None:
    dealt = halving.deal(heldout, dynamics, quota)
    assert sorted(trial for trial, _ in dealt) == list(range(9))
    by_dynamics = 0
    for place, (_, by) in enumerate(dealt, start=1):
        by_dynamics += by == DYNAMICS
        assert abs(by_dynamics - quota * place) <= 1 + 1e-6 or place > 5, "until a list is used up by the other"
    pure = (
        [trial for trial, _ in halving.deal(heldout, dynamics, 1.0)],
        [trial for trial, _ in halving.deal(heldout, dynamics, 0.0)],
    )
    assert pure == (list(dynamics), list(heldout))


def test_one_to_one_deals_in_turn_and_a_run_in_both_lists_takes_one_seat() -> None:
    assert halving.deal([1, 2, 3, 4], [1, 4, 3, 2], 0.5) == [(1, HELDOUT), (4, DYNAMICS), (2, HELDOUT), (3, DYNAMICS)]


def test_twelve_runs_leave_four_and_then_two_for_about_28_percent_of_the_work() -> None:
    first, second = halving.num_seats(12, 3), halving.num_seats(4, 2)
    assert (first, second) == (4, 2)
    assert (12 * 0.1 + first * 0.2 + second * 0.7) / 12 == pytest.approx(0.2833, abs=1e-4)


def test_the_next_in_order_is_revived_for_one_that_broke_down_and_the_named_go_on() -> None:
    crowd = [standing(n, norm=1.0 + n, loss=9.0 - n, target=1.0 + n) for n in range(9)]
    chosen = select(crowd, Rule(quota=0.0), kept=frozenset({8}))
    assert chosen.going() == [0, 1, 2, 8]
    assert chosen.going(frozenset({1})) == [0, 2, 3, 8]


@settings(max_examples=60)
@given(crowds(least=6), st.floats(0, 1))
def test_asynchronous_promotion_is_the_top_of_either_list(crowd: list[Standing], quota: float) -> None:
    rule = Rule(quota=quota, least=2)
    alive = [s for s in crowd if s.alive]
    ranks = halving.ranks_of(alive, "learn")
    found = halving.promotable(alive, rule, frozenset())
    top = math.floor(len(alive) / 3)
    by_loss = sorted(alive, key=lambda s: (ranks[s.trial].heldout_place, s.trial))[:top]
    assert {trial for trial, by in found if by == HELDOUT} <= {s.trial for s in by_loss}
    assert len(found) <= top
    if quota == 0:
        assert [trial for trial, _ in found] == [s.trial for s in by_loss]
    gone = frozenset(trial for trial, _ in found[:1])
    assert [trial for trial, _ in halving.promotable(alive, rule, gone)] == [trial for trial, _ in found[1:]]


@given(st.lists(st.tuples(finite, finite), min_size=4, max_size=12, unique=True))
def test_spearman_is_that_of_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert halving.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)


def test_the_interval_covers_zero_for_chance_and_not_for_a_signal() -> None:
    noise = random.Random(3)
    final = [noise.random() for _ in range(24)]
    told = halving.bootstrap([score + 0.1 * noise.random() for score in final], final)
    chance = halving.bootstrap([noise.random() for _ in final], final)
    assert told.low > 0.5 and not told.covers_zero and told.low <= told.value <= told.high
    assert chance.covers_zero
    assert halving.bootstrap([1.0, 2.0], [1.0, 2.0]).covers_zero, "two runs tell nothing"
    assert told == halving.bootstrap([score + 0.0 for score in [*final]], final) or told.runs == 24


def test_signals_are_turned_so_that_a_positive_number_points_the_right_way() -> None:
    crowd = [standing(n, norm=1.0 + n, loss=9.0 - n, target=1.0 + n) for n in range(8)]
    told = halving.foretold(crowd, {n: -float(n) for n in range(8)}, "learn")["A"]
    assert {name: round(c.value, 6) for name, c in told.items()} == dict.fromkeys(told, 1.0)


@given(st.lists(finite, min_size=2, max_size=7, unique=True), st.data())
def test_the_random_baseline_is_the_mean_over_all_choices(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    final = dict(enumerate(scores))
    every = [halving.regret(final, chosen) for chosen in itertools.combinations(final, count)]
    assert halving.random_regret(final, count) == pytest.approx(statistics.mean(every), abs=1e-9)
