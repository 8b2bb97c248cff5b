"""Model-based search: where to try next is learned from the trials so far (TPE, or a Gaussian process), with optuna asking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, SearchMethod
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.space import parse_space
from engine.core.work import Ask, Report, Trial
from engine.parts import trials as shared

GP_NEEDS = ("torch", "scipy")


class TPESearch(SearchMethod):
    """optuna's ask and tell around seeded samplers. After an interruption the same answers are told in the same order, so the same questions come."""

    card = Card(
        slug="tpe-search",
        title="Learn from trials",
        pick_when="Pick this when you can afford a dozen trainings or more and want every one of them to profit from those before.",
        summary="The first tries are random. From then on a small statistical model looks at what went well and what did not, and proposes the settings "
        "that are most likely to beat the best so far. Each proposal is trained to its end from the same start.",
        paper="Algorithms for Hyper-Parameter Optimization",
        year=2011,
        family="Search",
        algorithm=(
            "Train some random draws to their end and measure them on the kept-back examples.",
            "TPE: split the trials into the best share and the rest, fit a density of settings to each, l and g, draw candidates from l and take the one "
            "with the largest l/g, which has the largest expected improvement.",
            "Gaussian process: fit one to all scores and take the settings with the largest expected improvement (log EI).",
            "Train what was proposed, tell its score, and ask again. A run that broke down is told as failed.",
            "The best score goes home.",
        ),
        avoid_when="Only a few trainings are affordable: before about ten tries it knows nothing, and random search is as good.",
        traps=(
            "The kept-back examples choose the winner: its score is flattering, the more so the more trials there were.",
            "Scores differ by chance too. A proposal that is better by less than that chance says nothing.",
            "One trial after another is in its nature: it does not gain from many machines.",
        ),
        cost=Cost(time=5, memory=1, size=1),
    )
    presets = {
        "tiny": {"trials": 4, "first_random": 2, "space": "learning_rate=1e-3..1e-1"},
        "paper": {"trials": 50, "first_random": 10},
    }

    class Params(HyperParams):
        """Hyperparameters of a model-based search."""

        space: str = shared.space_dial()
        trials: int = dial(
            16, label="Trials", unit="runs", low=1, high=500, tier="basic", help="How many trainings there are in all."
        )
        sampler: Literal["tpe", "gp"] = dial(
            "tpe", label="What learns", tier="basic",
            help="tpe compares densities of good and bad settings and copes with everything; gp fits a smooth curve and needs fewer trials "
            "where only a few numbers change.",
        )  # fmt: skip
        max_minutes: float = shared.minutes_dial()
        first_random: int = dial(
            6, label="Random at first", unit="runs", low=1, high=200, paper=10,
            help="So many trials are random draws before the model is asked.",
        )  # fmt: skip
        candidates: int = dial(
            24, label="Candidates", unit="draws", low=1, high=10_000, paper=24,
            help="How many proposals tpe draws before it takes the most promising one.",
        )  # fmt: skip

    overrides = ("stop",)

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return float(params.trials)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        missing = [name for name in GP_NEEDS if params.sampler == "gp" and find_spec(name) is None]
        if not missing:
            return []
        return [
            Fault(
                where="sampler",
                what="The Gaussian process cannot be used here.",
                why=f"It needs {' and '.join(missing)}, which this installation lacks.",
                way_out="Choose tpe.",
                code="not_installed",
            )
        ]

    @classmethod
    def check_inner(cls, params: Any, recipe: Recipe) -> list[Fault]:
        return shared.space_faults(params.space, recipe)

    def begin(self, ctx: Any) -> None:
        p = self.params
        optuna = shared.quiet_optuna()
        self.knobs = parse_space(p.space, ctx.recipe)[0]
        self.steps_of = ctx.steps_of
        self.space = {knob.name: shared.distribution(knob) for knob in self.knobs}
        seed = ctx.rng.randrange(2**31)
        if p.sampler == "gp":
            sampler = optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=p.first_random, deterministic_objective=False
            )
        else:
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=p.first_random, n_ei_candidates=p.candidates
            )
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.failed_state = optuna.trial.TrialState.FAIL
        self.open: dict[int, Any] = {}

    def ask(self, trials: Sequence[Trial]) -> list[Ask]:
        if len(trials) >= self.params.trials or shared.is_over(trials, self.params.max_minutes):
            return []
        asked = self.study.ask(self.space)
        values = {knob.name: asked.params[knob.name] for knob in self.knobs}
        self.open[len(trials)] = asked
        return [Ask(trial=len(trials), until=self.steps_of(values), values=values)]

    def tell(self, trial: Trial) -> None:
        asked = self.open.pop(trial.number)
        if trial.failed or trial.is_stopped or not math.isfinite(trial.score):
            self.study.tell(asked, state=self.failed_state)
        else:
            self.study.tell(asked, trial.score)

    def winner(self, trials: Sequence[Trial]) -> int:
        return shared.best_trial(trials)

    def report(self, trials: Sequence[Trial], winner: int) -> Report:
        drawn = min(self.params.first_random, len(trials))
        said = f"The first {drawn} trials were drawn at random." if drawn > 1 else ""
        return shared.search_report(
            "Learned from trials", trials, winner, self.knobs, planned=self.params.trials,
            stands=lambda trial: self.standing(trial)[0], said=said,
        )  # fmt: skip
