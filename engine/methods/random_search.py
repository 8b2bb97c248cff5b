"""Random search: settings drawn from their ranges, each as a training of its own (Bergstra and Bengio 2012)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, SearchMethod
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.space import parse_space
from engine.core.work import Ask, Report, Trial
from engine.parts import trials as shared


class RandomSearch(SearchMethod):
    """Independent draws from the prior of every range: uniform, log-uniform for wide ranges, or one of the choices."""

    card = Card(
        slug="random-search",
        title="Try at random",
        pick_when="Pick this when several settings could matter and you do not know which: a handful of random tries finds out more than a grid.",
        summary="Settings are drawn at random from their ranges, and each draw is trained to its end from the same start. Every try shows a new value of "
        "every setting, so nothing is wasted on settings that do not matter. It is the honest baseline for every cleverer search.",
        paper="Random Search for Hyper-Parameter Optimization",
        year=2012,
        family="Search",
        algorithm=(
            "Draw every setting from its range: evenly, in factors where the range is wide, or one of the named values. No draw comes twice.",
            "Train each draw to its end from the same weights, data order and seed, and measure it on the kept-back examples.",
            "The best score goes home.",
        ),
        avoid_when="One setting with three values is all there is: then try every combination.",
        traps=(
            "The kept-back examples choose the winner: its score is flattering. Measure the result once more on examples of its own.",
            "The best of n draws lies among the best 5 % of the space with the probability 1 - 0.95^n: 0.46 for 12 draws, 0.95 for 59.",
        ),
        figures=(
            Figure(
                claim="Draws until neural networks match a grid of 100 combinations per data set",
                paper="8 of seven-parameter networks on most data sets (MNIST variants)",
            ),
        ),
        cost=Cost(time=5, memory=1, size=1),
    )
    presets = {"tiny": {"trials": 3, "space": "learning_rate=1e-3..1e-1"}, "paper": {"trials": 8}}

    class Params(HyperParams):
        """Hyperparameters of a random search."""

        space: str = shared.space_dial()
        trials: int = dial(
            12, label="Trials", unit="runs", low=1, high=500, tier="basic", help="How many draws are trained."
        )
        max_minutes: float = shared.minutes_dial()

    overrides = ("stop",)

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return float(params.trials)

    @classmethod
    def check_inner(cls, params: Any, recipe: Recipe) -> list[Fault]:
        return shared.space_faults(params.space, recipe)

    def begin(self, ctx: Any) -> None:
        self.knobs = parse_space(self.params.space, ctx.recipe)[0]
        self.steps_of = ctx.steps_of
        self.plan = shared.draws(self.knobs, self.params.trials, ctx.rng)

    def ask(self, trials: Sequence[Trial]) -> list[Ask]:
        return shared.next_of(self.plan, trials, self.steps_of, self.params.max_minutes)

    def winner(self, trials: Sequence[Trial]) -> int:
        return shared.best_trial(trials)

    def report(self, trials: Sequence[Trial], winner: int) -> Report:
        return shared.search_report(
            "Random trials", trials, winner, self.knobs, planned=len(self.plan), stands=lambda t: self.standing(t)[0]
        )
