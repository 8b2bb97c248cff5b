"""Successive halving with two rankings: many runs begin, and at 10 % and 30 % those go on whom held-out loss or early signals favour."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, SearchMethod
from engine.core.overrides import VERDICTS
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.space import parse_space
from engine.core.work import Ask, Mark, Report, Trial
from engine.parts import halving, rungs
from engine.parts import trials as shared
from engine.parts.halving import Ranks, Rule, Standing
from engine.parts.rungs import Decision


class SuccessiveHalving(SearchMethod):
    """Sections E and F of the card of early-dynamics-stopping. Every decision is a function of the marks alone, so that a replay decides the same again."""

    card = Card(
        slug="successive-halving",
        title="Start many, finish few",
        pick_when="Pick this when you want to compare six or more settings and cannot afford to train all of them to the end.",
        summary="All runs begin. After the first tenth about one in three goes on, after three tenths about half of those, and only the rest is trained to "
        "the end: a quarter to a third of the work of trying everything. Who goes on is decided by two lists in turn: who is best on kept-back "
        "examples, and who shows the early signs of a run that keeps what the model knew (small corrections, an error that is still high).",
        paper="Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs",
        year=2024,
        arxiv="2412.13337",
        family="Search",
        algorithm=(
            "Train every run over 10 % of its examples. Take g, the median norm of the gradient before clipping, L, the token-weighted mean of the training "
            "loss, and V, the held-out loss.",
            "Runs are comparable when base weights, data, order, mask and weighting of tokens, what learns, number format and limit for clipping agree. "
            "Inside each such group: score_dyn = rank(g, ascending) + rank(L, descending). Over all: score_val = rank(V_t), or rank(V_t + V_g) "
            "when what the model knew counts too.",
            "One of three goes on: seats are dealt from both lists in turn (the quota). The same again at 30 %, where one of two goes on.",
            "A run that breaks down later gives its seat to the next in order, which is revived from its checkpoint.",
            "One in ten of the stopped runs is trained to its end all the same, to see what the rule has missed.",
            "In the asynchronous form a run goes on as soon as it is in the top 1/eta, by either list, of those that have reached the rung so far.",
            "Watched only (shadow mode), nobody is stopped, and the report says what the rule would have cost.",
            "A person may overrule it while it runs: a run that is kept goes on beside the seats, and the seat that a stopped run held stays empty.",
        ),
        avoid_when="Fewer than six runs: then they are only ranked, and all of them are trained.",
        traps=(
            "Ordinary halving keeps the run with the lowest training error, the opposite of what the paper found; where old skills count, that can be worse "
            "than choosing at random.",
            "The sign depends on the goal: a higher early error speaks for kept abilities, not for the new task alone.",
            "Norm and training loss depend on batch size and learning rate by arithmetic alone; they are never compared across groups.",
            "In our study with a small Llama the loss pointed the right way and the norm did not: early signals alone chose worse than chance, and the "
            "alternating lists were saved by the kept-back examples.",
            "The evidence is full fine-tuning at 3B to 7B. For adapters and encoders the rule runs, but no paper backs it: watch it first.",
        ),
        figures=(
            Figure(
                claim="Lower early norm and higher early loss went with better final benchmarks",
                paper="found by the authors; no threshold and no rule for stopping published",
            ),
            Figure(
                claim="Worst regret over data and seeds, 24 runs of a two-layer net, goal both tasks: quota, held-out loss only, low training loss",
                paper="no such figure",
                ours="3.6, 10.0 and 17.7 points of accuracy (numpy, 6 seeds), 28 % of the full cost",
            ),
            Figure(
                claim="Regret in held-out loss, 12 runs of a small Llama, goal both: quota, held-out loss only, early signals only, low training loss, chance",
                paper="no such figure",
                ours="0.37, 0.19, 1.33, 2.94 and 1.16 (seeds 1 and 2), 28 % of the examples of the full grid",
            ),
        ),
        cost=Cost(time=4, memory=1, size=1),
    )
    presets = {
        "tiny": {
            "space": "learning_rate=1e-3..1e-1", "values": "random", "trials": 6, "first_rung": 0.34, "second_rung": 0.67, "rerun": 0.25,
        },
        "paper": {"values": "grid", "points": 4},
    }  # fmt: skip

    class Params(HyperParams):
        """Hyperparameters of the rule; the paper prints none, all of them are our design."""

        space: str = shared.space_dial()
        values: Literal["grid", "random"] = dial(
            "random", label="Which values", tier="basic",
            help="grid tries every combination of the values; random draws from the ranges.",
        )  # fmt: skip
        trials: int = dial(
            12, label="Random trials", unit="runs", low=1, high=500, tier="basic",
            help="How many runs begin when values are drawn at random; six at least, or nobody is stopped.",
        )  # fmt: skip
        goal: Literal["learn", "both"] = dial(
            "learn", label="What counts", tier="basic",
            help="learn: how well it does this task. both: that, and how much it keeps of what it knew before (language models).",
        )  # fmt: skip
        max_minutes: float = shared.minutes_dial()
        points: int = dial(
            3, label="Points in a range", unit="values", low=1, high=20,
            help="On a grid, a range that is given by its two ends is cut into this many values.",
        )  # fmt: skip
        quota: float = dial(
            0.5, label="Seats for early signals", unit="share", low=0.0, high=1.0,
            help="This share of those who go on is chosen by early signals, the rest by kept-back examples; one half deals in turn.",
        )  # fmt: skip
        first_rung: float = dial(
            0.1, label="First look", unit="share", low=0.02, high=0.6,
            help="The first decision falls after this share of the examples.",
        )  # fmt: skip
        second_rung: float = dial(
            0.3, label="Second look", unit="share", low=0.03, high=0.95,
            help="The second decision falls after this share of the examples.",
        )  # fmt: skip
        eta: float = dial(
            3.0, label="One of so many at first", unit="runs", low=1.0, high=10.0,
            help="At the first look one of this many goes on.",
        )  # fmt: skip
        eta_second: float = dial(
            2.0, label="One of so many later", unit="runs", low=1.0, high=10.0,
            help="At the second look one of this many goes on.",
        )  # fmt: skip
        asynchronous: bool = dial(
            False, label="Do not wait for all",
            help="A run goes on as soon as it is among the best of those that have come as far, without waiting for the others.",
        )  # fmt: skip
        shadow: bool = dial(
            False, label="Watch only",
            help="Nobody is stopped; the report says whom the rule would have stopped, and what that would have cost.",
        )  # fmt: skip
        rerun: float = dial(
            0.1, label="Check on stopped runs", unit="share", low=0.0, high=1.0,
            help="This share of the stopped runs, rounded down, is trained to its end all the same, to see what the rule has missed.",
        )  # fmt: skip
        keep: str = dial(
            "", label="Never stop",
            help="Numbers of trials that go on whatever the rule says, with commas between them; the first trial is 0.",
        )  # fmt: skip
        revive: bool = dial(
            False, label="Use all minutes",
            help="When the last survivor is trained and minutes are left, stopped runs go on in order, the best first.",
        )  # fmt: skip
        norm: Literal["raw", "corrected"] = dial(
            "raw", label="Which size of corrections",
            help="raw: as it was measured. corrected: freed of the chance that comes with small batches, where a method of the run reports it.",
        )  # fmt: skip

    overrides = VERDICTS

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        p = params
        count = shared.count_combinations(p.space, p.points) if p.values == "grid" else p.trials
        if p.shadow or count < rungs.LEAST:
            return float(count)
        first, second = (
            halving.num_seats(count, p.eta),
            halving.num_seats(halving.num_seats(count, p.eta), p.eta_second),
        )
        checked = math.floor(p.rerun * (count - second)) * (1 - p.first_rung)
        return count * p.first_rung + first * (p.second_rung - p.first_rung) + second * (1 - p.second_rung) + checked

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        return rungs.faults_of(params, facts)

    @classmethod
    def check_inner(cls, params: Any, recipe: Recipe) -> list[Fault]:
        return shared.space_faults(params.space, recipe, params.points if params.values == "grid" else 1)

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, ctx: Any) -> None:
        p = self.params
        self.knobs = parse_space(p.space, ctx.recipe)[0]
        self.rng: random.Random = ctx.rng
        if p.values == "grid":
            self.plan = shared.grid(self.knobs, p.points)
            self.rng.shuffle(self.plan)
        else:
            self.plan = shared.draws(self.knobs, p.trials, self.rng)
        self.ladder = rungs.Ladder((p.first_rung, p.second_rung), lambda number: ctx.steps_of(self.plan[number]))
        self.kept = frozenset(number for number in rungs.parse_numbers(p.keep) if number < len(self.plan))
        self.decisions: dict[tuple[int, int], Decision] = {}
        self.selections: dict[int, halving.Selection] = {}
        self.reruns: list[int] | None = None
        self.now: dict[int, Trial] = {}
        self.told: dict[int, str] = {}

    def ask(self, trials: Sequence[Trial]) -> list[Ask]:
        if shared.is_over(trials, self.params.max_minutes):
            return []
        self.now = {trial.number: trial for trial in trials}
        found = self._asynchronous() if self.params.asynchronous else self._in_rounds()
        return [found] if found is not None else []

    def _in_rounds(self) -> Ask | None:
        """Rung by rung: everybody to the first, then those who were chosen, then whoever is looked at besides."""
        entrants, named = list(range(len(self.plan))), self._named()
        for rung in (0, 1, 2):
            for number in sorted(entrants, key=lambda n: n not in named):  # who asked for one waits for it
                if not self._reached(number, rung) and not self._lost(number, rung) and not self._dropped(number):
                    return self._to(number, rung)
            if rung < 2:
                entrants = self._decide(rung, entrants)
        return self._besides()

    def _decide(self, rung: int, entrants: Sequence[int]) -> list[int]:
        """Who goes on at a rung that all entrants have reached: decided once by the rule and written down with what it was made of, and then turned by what
        people say, and by runs that break down."""
        if rung not in self.selections:
            standings = [self._standing_at(number, rung) for number in entrants if not self._is_guest(number, rung)]
            chosen = halving.select(standings, self._rule(rung, len(self.plan)), self.kept)
            self.selections[rung] = chosen
            going = chosen.going()
            for number in chosen.order:
                self._write_down(
                    rung, number, chosen.ranks[number], number in going, chosen.by.get(number, ""), len(entrants)
                )
        chosen, lost = self.selections[rung], self._lost_by(rung + 1)
        named, dropped = self._named(), frozenset(n for n in self.now if self._dropped(n))
        going = chosen.going(lost, named=named, dropped=dropped)
        # kept by a person, and here only now: the rule was never asked about it
        late = [n for n in entrants if n in named - lost and n not in chosen.order and self._reached(n, rung)]
        for number in late:
            if (number, rung) not in self.decisions:
                self._write_down(rung, number, self._ranks(rung).get(number, Ranks()), None, "", len(entrants))
        for number in going:
            if number not in dropped:
                self._let_go(number, rung, "revived" if lost else "last")
        return [*going, *late]

    def _is_guest(self, number: int, rung: int) -> bool:
        """Whether it is at this rung only because a person kept it at the one before: then the rule deals it no seat, so that nobody loses one to it."""
        before = self.decisions.get((number, rung - 1))
        return before is not None and before.by == rungs.BY_YOU and not before.ruled

    def _ranks(self, rung: int) -> dict[int, Ranks]:
        """Both rankings of all that have reached a rung so far."""
        here = [n for n in self.now if self._reached(n, rung) and not self._lost(n, rung)]
        return halving.ranks_of([self._standing_at(number, rung) for number in here], self.params.goal)

    def _besides(self) -> Ask | None:
        """Runs that the rule stopped: all of them when it is only watched, one in ten to check it, and more while minutes are left."""
        stopped = [n for n in range(len(self.plan)) if n in self.now and not self._ended(n) and not self._dropped(n)]
        if self.params.shadow:
            return self._to(stopped[0], self._rung(stopped[0]) + 1) if stopped else None
        if self.reruns is None:
            count = math.floor(self.params.rerun * len(stopped) + 1e-9)
            self.reruns = sorted(self.rng.sample(stopped, count))
        for number in self.reruns:
            if not self._ended(number) and not self._dropped(number):
                self.told[number] = f"Trial {number} was stopped by the rule and is trained to its end to check it."
                return self._to(number, 2)
        if self.params.revive and self.params.max_minutes > 0 and stopped:
            number = self._first_of(stopped)
            self.told[number] = f"Trial {number} was stopped by the rule and goes on, because minutes are left."
            return self._to(number, 2)
        return None

    def _asynchronous(self) -> Ask | None:
        """ASHA: the highest rung with somebody to promote, or else a new run; at the end at least one run is trained whole."""
        few, named = len(self.plan) < rungs.LEAST, self._named()
        for number in sorted(named):
            if number in self.now and self._rung(number) < 0 and not self._ended(number):
                return self._to(number, 0)
        for rung in (1, 0):
            here = [n for n in self.now if self._reached(n, rung) and not self._lost(n, rung)]
            gone = frozenset(n for n in here if self._rung(n) > rung)
            standings = [self._standing_at(number, rung) for number in here]
            rule = self._rule(rung, len(self.plan))
            ruled = [standing for standing in standings if not self._is_guest(standing.trial, rung)]
            seated = frozenset(n for n in gone if not self._is_guest(n, rung) and not self._is_guest(n, rung + 1))
            able = halving.promotable(ruled, rule, seated) if rung or len(here) >= rungs.LEAST else []
            able = [(n, by) for n, by in able if n not in gone]
            wanted = self.kept | named
            able += [(n, "") for n in here if (few or n in wanted) and n not in gone and n not in dict(able)]
            able = [(n, by) for n, by in able if not self._dropped(n)]
            if able:
                number, by = able[0]
                ranks = halving.ranks_of(standings, self.params.goal)
                if number not in named or (number, rung) not in self.decisions:
                    asked = by or few or number not in named - self.kept
                    self._write_down(rung, number, ranks[number], True if asked else None, by, len(here))
                return self._to(number, rung + 1)
        if len(self.now) < len(self.plan):
            return self._to(len(self.now), 0)
        self._rest_is_stopped()
        if any(self._ended(n) and not self.now[n].failed for n in self.now):
            return self._besides()
        left = [n for n in self.now if not self._ended(n) and not self._dropped(n)]
        if not left:
            return None
        number = self._first_of(left)
        self._let_go(number, self._rung(number), "last")
        return self._to(number, self._rung(number) + 1)

    def _rest_is_stopped(self) -> None:
        """Nobody can be promoted any more: what waits at a rung stays there."""
        for rung in (0, 1):
            here = [n for n in self.now if self._reached(n, rung) and not self._lost(n, rung)]
            ranks = halving.ranks_of([self._standing_at(n, rung) for n in here], self.params.goal)
            for number in here:
                if (number, rung) in self.decisions or self._ended(number) or self._dropped(number):
                    continue
                if self._rung(number) == rung:
                    self._write_down(rung, number, ranks[number], False, "", len(here))

    def _first_of(self, numbers: Sequence[int]) -> int:
        """The one that came furthest, and there the first in the order of both lists."""
        far = max(self._rung(number) for number in numbers)
        here = [number for number in numbers if self._rung(number) == far]
        everyone = [n for n in self.now if self._reached(n, far) and not self._lost(n, far)]
        order = halving.select([self._standing_at(n, far) for n in everyone], self._rule(far, len(self.plan))).order
        return next(number for number in order if number in here)

    def _to(self, number: int, rung: int) -> Ask:
        return Ask(trial=number, until=self.ladder.until(number, rung), values=self.plan[number])

    # ── where a run stands ────────────────────────────────────────────────────────────────────────────────────────────

    def _rule(self, rung: int, planned: int) -> Rule:
        p = self.params
        least = (
            rungs.LEAST if rung == 0 or planned < rungs.LEAST else 1
        )  # at the second rung those are left whom the first one chose
        return Rule(eta=p.eta if rung == 0 else p.eta_second, quota=p.quota, goal=p.goal, least=least)

    def _mark(self, number: int, rung: int) -> Mark | None:
        return self.ladder.mark(self.now.get(number), rung)

    def _reached(self, number: int, rung: int) -> bool:
        return self._mark(number, rung) is not None

    def _lost(self, number: int, rung: int) -> bool:
        """Whether it broke down on its way to this rung or before."""
        trial = self.now.get(number)
        return trial is not None and bool(trial.failed) and self.ladder.mark(trial, rung) in (None, trial.marks[-1])

    def _lost_by(self, rung: int) -> frozenset[int]:
        return frozenset(number for number in self.now if self._lost(number, rung))

    def _rung(self, number: int) -> int:
        """The highest rung that it has reached; -1 before the first."""
        return max((rung for rung in (0, 1, 2) if self._reached(number, rung)), default=-1)

    def _dropped(self, number: int) -> bool:
        """Whether a person has stopped it."""
        return number in self.now and self.now[number].is_stopped

    def _named(self) -> frozenset[int]:
        """Runs that a person keeps."""
        return frozenset(number for number, trial in self.now.items() if trial.is_kept)

    def _ended(self, number: int) -> bool:
        return bool(self.now[number].failed) or self._reached(number, 2)

    def _standing_at(self, number: int, rung: int) -> Standing:
        """What it showed. A group that was too small at the first rung has no say by norm and training loss later either."""
        found = rungs.standing_at(
            number, self._mark(number, rung), self.params.norm, alive=not self._lost(number, rung)
        )
        if rung > 0 and len(self.plan) >= rungs.LEAST:
            first = [self._mark(n, 0) for n in self.now if not self._lost(n, 0)]
            if sum(mark is not None and mark.group == found.group for mark in first) < rungs.LEAST:
                return replace(found, norm=math.nan, loss=math.nan)
        return found

    def _let_go(self, number: int, rung: int, why: str) -> None:
        """A run that was stopped at a rung goes on after all; why: "revived" or "last"."""
        before = self.decisions.get((number, rung))
        if before is not None and not before.goes_on:
            self.decisions[number, rung] = replace(before, goes_on=True, ruled=True, by=why, saved_samples=0)
            self.told[number] = self.decisions[number, rung].sentence

    def _write_down(self, rung: int, number: int, ranks: Ranks, ruled: bool | None, by: str, entrants: int) -> None:
        """The decision about one run. ruled: what the rule says; None where it was not asked, so that a person alone decides."""
        mark = self._mark(number, rung)
        assert mark is not None
        share = (self.params.first_rung, self.params.second_rung)[rung]
        named = bool(ruled) and by == "" and number in self.kept
        self.decisions[number, rung] = Decision(
            trial=number, rung=share, goes_on=bool(ruled), by="named" if named else by, ranks=ranks, entrants=entrants,
            group=mark.group, saved_samples=0 if ruled else mark.planned_samples - mark.samples, shadow=self.params.shadow,
            only_ranked=len(self.plan) < rungs.LEAST, ruled=ruled,
        )  # fmt: skip
        if not self._dropped(number):
            self.told[number] = self.decisions[number, rung].sentence
        self._turn(self.now[number])

    def heed(self, trial: Trial) -> None:
        self.now[trial.number] = trial
        assert trial.override is not None
        self.told[trial.number] = trial.override.sentence
        self._turn(trial)

    def _turn(self, trial: Trial) -> None:
        """Turn the last decision about a run where a person decides otherwise."""
        keys = [key for key in self.decisions if key[0] == trial.number]
        if trial.override is None or not keys:
            return
        last = self.decisions[keys[-1]]
        if last.goes_on != trial.is_kept:
            mark = trial.marks[-1]
            share = mark.samples / mark.planned_samples if mark.planned_samples else None
            beyond = share is not None and mark != self._mark(trial.number, keys[-1][1])
            self.decisions[keys[-1]] = last.turned(
                goes_on=trial.is_kept, person=trial.override.by, share=share if beyond else None,
                saved_samples=0 if trial.is_kept else mark.planned_samples - mark.samples,
            )  # fmt: skip
            self.told[trial.number] = self.decisions[keys[-1]].sentence

    # ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────

    def standing(self, trial: Trial) -> tuple[str, str]:
        said = self.told.get(trial.number, "")
        if trial.failed:
            return "failed", trial.failed
        if shared.is_finished(trial):
            return "finished", said
        if trial.is_stopped:
            return "stopped", said
        last = [decision for (number, _), decision in self.decisions.items() if number == trial.number]
        stopped = bool(last) and not last[-1].goes_on and not self.params.shadow
        return ("stopped" if stopped else "waiting"), said

    def _final(self, trial: Trial) -> float:
        return rungs.final_score(trial, self.params.goal)

    def winner(self, trials: Sequence[Trial]) -> int:
        return shared.best_trial(trials, self._final)

    def report(self, trials: Sequence[Trial], winner: int) -> Report:
        self.now = {trial.number: trial for trial in trials}
        checked = [n for n in self.reruns or () if n in self.now and shared.is_finished(self.now[n])]
        survivors = [
            number for number, trial in self.now.items()
            if shared.is_finished(trial) and number not in checked and all(d.ruled for d in self._of(number))
        ]  # fmt: skip
        plain = shared.search_report(
            "Start many, finish few", trials, winner, self.knobs, planned=len(self.plan), stands=lambda trial: self.standing(trial)[0],
            said=rungs.spoken(self.decisions.values(), len(self.plan), shadow=self.params.shadow),
        )  # fmt: skip
        final = {number: self._final(trial) for number, trial in self.now.items() if shared.is_finished(trial)}
        first = [self._standing_at(number, 0) for number in self.now if self._reached(number, 0)]
        second = [self._standing_at(number, 1) for number in self.now if self._reached(number, 1)]
        return rungs.full_report(
            plain, self.decisions.values(), first, second, final=final, survivors=survivors, checked=checked, goal=self.params.goal,
            knobs=self.knobs, trials=self.now, shadow=self.params.shadow,
        )  # fmt: skip

    def _of(self, number: int) -> list[Decision]:
        return [decision for (trial, _), decision in self.decisions.items() if trial == number]
