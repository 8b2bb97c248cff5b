"""Population-based training: several runs side by side; the weak copy the strong and change their settings a little."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, SearchMethod
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.space import SPACE_HELP, Knob, is_live, parse_space
from engine.core.work import Ask, Report, Trial
from engine.parts import trials as shared
from engine.parts.population import Lineage, Population, history_of


class PBT(SearchMethod):
    """Truncation selection, multiplicative perturbation, resampling (Jaderberg et al. 2017, sections 3 and 4.1)."""

    card = Card(
        slug="pbt",
        title="Population training",
        pick_when="Pick this when you can afford several trainings of the same model and would rather have the settings improved while it learns "
        "than guess them before.",
        summary="Several copies of a run learn side by side, each with other settings. Every little while the weakest copies take over the weights "
        "of the strongest and go on with slightly changed settings. You get the best copy, and the list of settings it had at each moment: a "
        "schedule that can be used again.",
        paper="Population Based Training of Neural Networks",
        year=2017,
        arxiv="1711.09846",
        family="Search",
        algorithm=(
            "Draw settings for every member from the ranges; all start from the same model and the same seed.",
            "Train every member for one interval, in turn, the one that is furthest behind first; measure it on the kept-back examples.",
            "At the border of an interval rank the members by their last score. Each of the weakest share takes over a random one of the strongest: "
            "weights, optimizer moments, counters, generators and position in the data.",
            "Then it changes the settings it took over: each is drawn afresh with probability 0.25, and otherwise multiplied by 1.2 or 0.8; choices "
            "move to a neighbour. Everything is clipped to its range.",
            "Go on to the end. The best member goes home with its ancestry: which settings it had, when, and from whom it came.",
        ),
        avoid_when="One training is all you can afford, or the setting in question changes the shape of the model, such as a rank.",
        traps=(
            "Multiplying never leaves zero: start values are drawn strictly inside of the ranges, and fresh draws stay possible.",
            "Greed: an early drop of the learning rate wins at once and loses in the end. Nobody is copied before the burn-in is over, and "
            "intervals below 5 % of the run are warned about.",
            "Copying weights without the optimizer's moments gives a jump; here the whole checkpoint is taken over, and the new settings apply after it.",
            "The kept-back examples choose the winner many times over: its score is flattering. Measure the result once more on examples of its own.",
            "With fewer than five members and a quarter copying, one copies one: a line search.",
        ),
        figures=(
            Figure(
                claim="Held-out loss of the best of six members against the best of six fixed rates, equal steps",
                paper="no such figure",
                ours="2.555 and 2.870 against 2.644 and 2.966 (stories260k with LoRA on Shakespeare, 60 steps, seeds 1 and 2)",
            ),
            Figure(claim="Transformer, WMT14 English-German, BLEU", paper="23.71 to 24.23 (unconfirmed)"),
            Figure(claim="Reinforcement learning on DM Lab, human-normalised", paper="93 % to 106 % (unconfirmed)"),
        ),
        cost=Cost(time=5, memory=2, size=1),
    )
    presets = {
        "tiny": {"population": 3, "interval": 0.34, "burn_in": 0.0, "quantile": 0.34},
        "paper": {"population": 20, "interval": 0.05, "quantile": 0.2, "burn_in": 0.0},
    }

    class Params(HyperParams):
        """Hyperparameters of population-based training."""

        population: int = dial(
            6, label="Members", unit="runs", low=2, high=64, tier="basic", paper=20,
            help="How many copies learn side by side; each costs a whole training.",
        )  # fmt: skip
        space: str = dial("learning_rate", label="What may change", tier="basic", help=SPACE_HELP)
        interval: float = dial(
            0.1, label="Time between copies", unit="share", low=0.005, high=0.5, paper=0.05,
            help="After this share of the run members are compared and the weak may copy the strong.",
        )  # fmt: skip
        quantile: float = dial(
            0.25, label="Share that copies", unit="share", low=0.01, high=0.5, paper=0.2,
            help="This share of the members, the weakest, takes over members of the equally large strongest share.",
        )  # fmt: skip
        resample: float = dial(
            0.25, label="Fresh draws", unit="share", low=0.0, high=1.0, paper=0.25,
            help="How often a setting is drawn afresh from its range instead of being moved a little.",
        )  # fmt: skip
        factor: float = dial(
            1.2, label="Size of a move", unit="1", low=1.01, high=4.0, paper=1.2,
            help="A moved setting is multiplied by this number or by 2 minus it (0.8), each half of the time; above 1.9 by its inverse.",
        )  # fmt: skip
        burn_in: float = dial(
            0.1, label="No copies before", unit="share", low=0.0, high=0.9, paper=0.0,
            help="Members learn undisturbed over this share of the run, so that a lucky start does not win.",
        )  # fmt: skip
        copy_values: bool = dial(
            True, label="Copy settings too",
            help="Whether a member that takes over weights takes over the settings as well; without, it keeps its own.",
        )  # fmt: skip
        schedule: str = dial(
            "", label="Follow a schedule",
            help="The schedule of an earlier population (the text in its report): one run follows it, and nothing is searched.",
        )  # fmt: skip

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return 1.0 if params.schedule else float(params.population)

    @classmethod
    def check_inner(cls, params: Any, recipe: Recipe) -> list[Fault]:
        knobs, faults = parse_space(params.space, recipe)
        for knob in knobs:
            if not is_live(knob, recipe):
                faults.append(
                    Fault(
                        where="space", code="not_live",
                        what=f"'{knob.name}' cannot change while a run goes on.",
                        why="Members hand their state to each other, so every one must be built alike.",
                        way_out="Leave it out of the ranges, and set it once for all members; learning_rate can change, for example.",
                    )
                )  # fmt: skip
        if params.schedule:
            faults += Lineage.faults(params.schedule)
        return faults

    def begin(self, ctx: Any) -> None:
        p = self.params
        self.knobs: tuple[Knob, ...] = parse_space(p.space, ctx.recipe)[0]
        self.total: int = ctx.total_steps
        self.rng: random.Random = ctx.rng
        self.replayed = Lineage.parse(p.schedule) if p.schedule else None
        self.interval = max(1, round(p.interval * self.total))
        self.population = Population(
            knobs=self.knobs,
            size=p.population,
            quantile=p.quantile,
            resample=p.resample,
            factor=p.factor,
            copy_values=p.copy_values,
            rng=self.rng,
        )

    def ask(self, trials: Sequence[Trial]) -> list[Ask]:
        if self.replayed is not None:
            return self._replay(trials)
        if not trials:
            first = min(self.interval, self.total)
            return [Ask(trial=n, until=first, values=self.population.start()) for n in range(self.params.population)]
        step = min((trial.step for trial in trials if not trial.failed), default=self.total)
        if step >= self.total:
            return []
        until = min(step + self.interval, self.total)
        if self.total - until < self.interval // 2:
            until = self.total  # no stump of an interval at the end
        moves = self.population.moves(trials) if step >= self.params.burn_in * self.total else {}
        # Donors stand at the border already, so everyone may be trained in turn; receivers come first, before a donor moves on.
        order = sorted(trials, key=lambda trial: (trial.number not in moves, trial.number))
        return [self._next(trial, until, moves) for trial in order if not trial.failed or trial.number in moves]

    def _next(self, trial: Trial, until: int, moves: dict[int, Any]) -> Ask:
        move = moves.get(trial.number)
        if move is None:
            return Ask(trial=trial.number, until=until, values=dict(trial.values))
        return Ask(trial=trial.number, until=until, values=move.values, donor=move.donor, reason=move.sentence)

    def _replay(self, trials: Sequence[Trial]) -> list[Ask]:
        assert self.replayed is not None
        done = trials[0].step if trials else 0
        for until, values in self.replayed.slices:
            if until > done:
                return [Ask(trial=0, until=min(until, self.total), values=values)] if done < self.total else []
        return []

    def winner(self, trials: Sequence[Trial]) -> int:
        return self.population.best(trials)

    def standing(self, trial: Trial) -> tuple[str, str]:
        state, said = super().standing(trial)
        if said or not trial.donors:
            return state, said
        step, donor = trial.donors[-1]
        return state, f"Took over member {donor} at step {step:,}."

    def report(self, trials: Sequence[Trial], winner: int) -> Report:
        lineage = Lineage.of(trials, winner)
        plain = shared.search_report(
            "Population training", trials, winner, self.knobs, planned=1 if self.replayed else self.params.population,
            stands=lambda trial: self.standing(trial)[0],
        )  # fmt: skip
        best = next(trial for trial in trials if trial.number == winner)
        copies = sum(len(trial.donors) for trial in trials)
        start = {
            knob.name: best_start for knob, best_start in zip(self.knobs, lineage.first_values(self.knobs), strict=True)
        }
        spread = [t.score for t in trials if math.isfinite(t.score)]
        history = history_of(trials, self.knobs)
        weights = shared.importance(history, self.knobs, "gain")
        donors = {trial.number: trial.donors for trial in trials}
        members = "member" if len(trials) == 1 else "members"
        notes = [*plain.notes, f"The schedule of the winner, to be followed again: {lineage.text()}"]
        if weights:
            notes.append(
                "How much each setting mattered was measured by how far each slice brought a member, against the other members in the same interval: weights are "
                "handed on, so the last score of a member is not the work of its last settings alone."
            )
        return replace(
            plain,
            sentence=f"Member {winner} of {len(trials)} {members} is the best, with the score {best.score:.4g} "
            f"({min(spread):.4g} to {max(spread):.4g} in all); weak members copied strong ones {copies} times.",
            numbers={**plain.numbers, "copies": copies, "first": start, "schedule": json.loads(lineage.text()), "importance": weights},
            table=tuple({**row, "took over": _takeovers(donors[row["trial"]])} for row in plain.table),
            history=history,
            curve=("step", "score"),
            notes=tuple(notes),
        )  # fmt: skip


def _takeovers(donors: Sequence[tuple[int, int]]) -> str:
    """Whom a member took over, and when."""
    return ", ".join(f"{donor} at step {step:,}" for step, donor in donors) or "nobody"
