"""Grid search: every combination of the values, each as a training of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, SearchMethod
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.space import parse_space
from engine.core.work import Ask, Report, Trial
from engine.parts import trials as shared


class GridSearch(SearchMethod):
    """All combinations, in an order drawn by the seed, so that what ran before the time was up is a fair sample of the whole."""

    card = Card(
        slug="grid-search",
        title="Try every combination",
        pick_when="Pick this when you have one or two settings with a few values each and want to see every one of them side by side.",
        summary="Every combination of the values that you name is trained to its end from the same start. You get the best result, a table of all, "
        "and how much each setting mattered.",
        family="Search",
        algorithm=(
            "Take the named values of each setting; cut a range into a few points, evenly spaced in factors where it is wide.",
            "Shuffle all combinations with the seed.",
            "Train each to its end from the same weights, data order and seed, and measure it on the kept-back examples.",
            "The best score goes home.",
        ),
        avoid_when="More than two settings change: the combinations multiply, and most of the time goes into values that do not matter.",
        traps=(
            "The kept-back examples choose the winner: its score is flattering. Measure the result once more on examples of its own.",
            "A winner at the edge of a range says that the range was too narrow.",
        ),
        cost=Cost(time=5, memory=1, size=1),
    )
    presets = {"tiny": {"space": "learning_rate=1e-3|1e-2|5e-2"}, "paper": {"points": 5}}

    class Params(HyperParams):
        """Hyperparameters of a grid search."""

        space: str = shared.space_dial()
        points: int = dial(
            3, label="Points in a range", unit="values", low=1, high=20, tier="basic",
            help="A range that is given by its two ends is cut into this many values.",
        )  # fmt: skip
        max_minutes: float = shared.minutes_dial()

    overrides = ("stop",)

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return float(shared.count_combinations(params.space, params.points))

    @classmethod
    def check_inner(cls, params: Any, recipe: Recipe) -> list[Fault]:
        return shared.space_faults(params.space, recipe, params.points)

    def begin(self, ctx: Any) -> None:
        p = self.params
        self.knobs = parse_space(p.space, ctx.recipe)[0]
        self.steps_of, rng = ctx.steps_of, ctx.rng
        self.plan: list[dict[str, Any]] = shared.grid(self.knobs, p.points)
        rng.shuffle(self.plan)

    def ask(self, trials: Sequence[Trial]) -> list[Ask]:
        return shared.next_of(self.plan, trials, self.steps_of, self.params.max_minutes)

    def winner(self, trials: Sequence[Trial]) -> int:
        return shared.best_trial(trials)

    def report(self, trials: Sequence[Trial], winner: int) -> Report:
        return shared.search_report(
            "Every combination",
            trials,
            winner,
            self.knobs,
            planned=len(self.plan),
            stands=lambda t: self.standing(t)[0],
        )
