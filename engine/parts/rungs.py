"""The rungs of successive halving: where each run pauses, what it showed there, decisions in sentences, and the report with the check of the rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.space import Knob
from engine.core.work import Mark, Report, Trial
from engine.parts import halving
from engine.parts.halving import DYNAMICS, HELDOUT, Ranks, Standing
from engine.parts.trials import importance

LEAST = 6  # fewer runs are ranked and none is stopped
NAN = float("nan")
WITH_GENERAL = (
    "causal_lm",
    "instruct",
    "verifiable",
    "preference",
)  # goals whose held-out scores include the general set
BY_YOU = "you"
_LISTS = {HELDOUT: "chosen by kept-back examples", DYNAMICS: "chosen by early signals", "named": "because the recipe names it",
          "revived": "in the place of one that broke down", "last": "as the best of those that came furthest"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided about one run at a rung, and from what. rung: the share of its examples; entrants: runs that were compared."""

    trial: int
    rung: float
    goes_on: bool
    by: str  # the list that gave it its seat, another of the reasons above, BY_YOU, or nothing
    ranks: Ranks
    entrants: int
    group: str
    saved_samples: int
    shadow: bool = False
    only_ranked: bool = False
    ruled: bool | None = None  # what the rule itself says; None where a person kept a run that it was not asked about
    person: str = ""  # who decided otherwise
    share: float | None = None  # of its examples that it had read when a person decided, where that was not at the rung

    def turned(self, *, goes_on: bool, person: str, saved_samples: int, share: float | None = None) -> Decision:
        """The same, decided by a person."""
        return replace(self, goes_on=goes_on, by=BY_YOU, person=person, saved_samples=saved_samples, share=share)

    @property
    def sentence(self) -> str:
        """For the log and the table of trials."""
        r = self.ranks
        places = (
            [f"place {r.heldout_place:g} of {self.entrants} by kept-back examples"]
            if math.isfinite(r.heldout_place)
            else []
        )
        if math.isfinite(r.dynamics_place):
            places.append(f"place {r.dynamics_place:g} of {r.group_size} by early signals")
        found = f"{self.rung:.0%} of its examples ({', '.join(places) or 'nothing was measured'})"
        if self.by == BY_YOU:
            against = ", against the rule" if self.ruled is not None and self.ruled != self.goes_on else ""
            if self.goes_on:
                return f"Trial {self.trial} goes on after {found}, kept by you ({self.person}){against}."
            where = found if self.share is None else f"{self.share:.0%} of its examples"
            saved = f"{self.saved_samples:,} examples are saved"
            return f"Trial {self.trial} is stopped by you ({self.person}) after {where}{against}; {saved}."
        if self.goes_on:
            why = (
                "; with fewer than six runs nobody is stopped"
                if self.only_ranked
                else f", {_LISTS[self.by]}"
                if self.by
                else ""
            )
            return f"Trial {self.trial} goes on by the rule after {found}{why}."
        if self.shadow:
            return f"Trial {self.trial} would be stopped by the rule after {found}; it goes on because the rule is only watched."
        return f"Trial {self.trial} is stopped by the rule after {found}; {self.saved_samples:,} examples are saved."

    @property
    def word(self) -> str:
        """For a cell of the table."""
        return f"{'goes on' if self.goes_on else 'stops'}{', by you' if self.by == BY_YOU else ''}"

    def row(self) -> dict[str, Any]:
        """For the report: rung, both ranks, group size, saved samples."""
        r = self.ranks
        return {
            "rung": self.rung,
            "trial": self.trial,
            "goes_on": self.goes_on,
            "by": self.by,
            "person": self.person,
            "group": self.group,
            "group_size": r.group_size,
            "entrants": self.entrants,
            "dynamics": _known(r.dynamics),
            "dynamics_place": _known(r.dynamics_place),
            "heldout": _known(r.heldout),
            "heldout_place": _known(r.heldout_place),
            "saved_samples": self.saved_samples,
        }


class Ladder:
    """Where each run pauses: two shares of its own length, at least one step apart, and its end. Runs with larger batches have fewer steps."""

    def __init__(self, shares: tuple[float, float], total_of: Callable[[int], int]) -> None:
        self.shares, self._total_of = shares, total_of
        self._totals: dict[int, int] = {}

    def total(self, number: int) -> int:
        """The steps of a whole run."""
        if number not in self._totals:
            self._totals[number] = self._total_of(number)
        return self._totals[number]

    def until(self, number: int, rung: int) -> int:
        """The step of a rung: 0 and 1 are the looks, 2 is the end."""
        total = self.total(number)
        return total if rung > 1 else min(total, max(rung + 1, round(self.shares[rung] * total)))

    def mark(self, trial: Trial | None, rung: int) -> Mark | None:
        """The mark with which a run arrived at a rung."""
        if trial is None:
            return None
        return next((mark for mark in trial.marks if mark.step >= self.until(trial.number, rung)), None)


def parse_numbers(text: str) -> frozenset[int]:
    """Numbers with commas between them."""
    return frozenset(int(piece) for piece in text.replace(" ", "").split(",") if piece)


def faults_of(params: Any, facts: Facts) -> list[Fault]:
    """What does not go together among the dials of the rule."""
    faults = []
    if params.first_rung >= params.second_rung:
        faults.append(
            Fault(
                where="second_rung", code="rungs_crossed",
                what=f"The second look is at {params.second_rung:.0%} and the first at {params.first_rung:.0%}.",
                why="A decision builds on the one before.", way_out=f"Choose more than {params.first_rung:g}.",
            )
        )  # fmt: skip
    if params.goal == "both" and facts.task not in WITH_GENERAL:
        faults.append(
            Fault(
                where="goal", code="does_not_fit",
                what="What this model knew before cannot be measured.",
                why="The general texts that measure it are for models that write.", way_out="Choose learn.",
            )
        )  # fmt: skip
    pure = {("learn", 1.0): "Early signals alone speak for kept abilities, not for the new task",
            ("both", 0.0): "The loss on kept-back examples alone tends to choose runs that forget"}.get((params.goal, params.quota))  # fmt: skip
    if pure:
        faults.append(
            Fault(
                where="quota", code="quota_against_goal", what=f"A quota of {params.quota:g} does not fit what counts here.",
                why=f"{pure}.", way_out="Choose 0.5, or the other answer to what counts.",
            )
        )  # fmt: skip
    if params.asynchronous and params.shadow:
        faults.append(
            Fault(
                where="asynchronous", code="not_together", what="Watching only and not waiting for all exclude each other.",
                why="Watching compares complete rungs.", way_out="Switch one of them off.",
            )
        )  # fmt: skip
    try:
        parse_numbers(params.keep)
    except ValueError:
        faults.append(
            Fault(
                where="keep", code="bad_numbers", what=f"'{params.keep[:60]}' is not a list of trials.",
                why="Trials have numbers, from 0.", way_out="Write numbers with commas between them, such as 3, 7.",
            )
        )  # fmt: skip
    return faults


def standing_at(number: int, mark: Mark | None, norm: str, *, alive: bool) -> Standing:
    """What a run showed at a rung. norm: "raw", or "corrected" for the norm freed of batch noise (engine.parts.signals.noise_corrected)."""
    if mark is None or not alive:
        return Standing(trial=number, group="", alive=False)
    early = mark.early
    squared = early.get("true_norm_squared", NAN)
    corrected = math.sqrt(squared) if squared > 0 else NAN
    return Standing(
        trial=number,
        group=mark.group,
        norm=corrected if norm == "corrected" else early.get("norm", NAN),
        loss=early.get("loss", NAN),
        target=mark.heldout.get("eval_loss", NAN),
        general=mark.heldout.get("general_loss", NAN),
    )


def final_score(trial: Trial, goal: str) -> float:
    """What the end is judged by, larger is better: the task's own score, or minus the sum of held-out and general loss."""
    heldout = trial.marks[-1].heldout if trial.marks else {}
    if goal == "both" and {"eval_loss", "general_loss"} <= heldout.keys():
        return -(heldout["eval_loss"] + heldout["general_loss"])
    return trial.score


def spoken(decisions: Collection[Decision], planned: int, *, shadow: bool) -> str:
    """How many were stopped, in a sentence."""
    if planned < LEAST:
        return f"With {planned} trials, fewer than six, they were only ranked."
    parts = []
    for rung in sorted({decision.rung for decision in decisions}):
        here = [decision for decision in decisions if decision.rung == rung and decision.ruled is not None]
        parts.append(f"{sum(not d.ruled for d in here)} of {len(here)} at {rung:.0%}")
    return f"{'The rule would have stopped' if shadow else 'The rule stopped'} {' and '.join(parts)}." if parts else ""


def full_report(
    plain: Report,
    decisions: Collection[Decision],
    first: Sequence[Standing],
    second: Sequence[Standing],
    *,
    final: Mapping[int, float],
    survivors: Sequence[int],
    checked: Sequence[int],
    goal: str,
    knobs: Sequence[Knob],
    trials: Mapping[int, Trial],
    shadow: bool,
) -> Report:
    """The plain report of a search with both ranks in its table, every decision, and the check of the rule.

    first, second: what the runs showed at the two looks; final: final scores of the runs that were trained to the end; survivors: those whom the rule let through;
    checked: stopped runs that were trained to the end to check it.
    """
    letters = {group: _letter(place) for place, group in enumerate(dict.fromkeys(s.group for s in first if s.group))}
    by_trial = {(decision.trial, decision.rung): decision for decision in decisions}
    shares = sorted({decision.rung for decision in decisions})
    early = {standing.trial: standing for standing in first}
    table = []
    for row in plain.table:
        number = int(row["trial"])
        seen = early.get(number)
        more: dict[str, Any] = {"group": letters.get(seen.group, "–") if seen else "–"}
        more["early norm"], more["early loss"] = (_known(seen.norm), _known(seen.loss)) if seen else (None, None)
        for share in shares:
            decision = by_trial.get((number, share))
            ranks = decision.ranks if decision else Ranks()
            more[f"held-out rank at {share:.0%}"] = _known(ranks.heldout_place)
            more[f"early rank at {share:.0%}"] = _known(ranks.dynamics_place)
            more[f"at {share:.0%}"] = None if decision is None else decision.word
        table.append({**row, **more})
    numbers = {**plain.numbers, "decisions": [decision.row() for decision in decisions]}
    numbers["saved examples"] = sum(decision.saved_samples for decision in decisions)
    notes = [*plain.notes]
    sizes = {letter: sum(s.group == group for s in first) for group, letter in letters.items()}
    small = [letter for letter, size in sizes.items() if size < LEAST]
    if small and len(first) >= LEAST:
        notes.append(
            f"Group {', '.join(small)} has fewer than six runs, so early signals had no say there: only kept-back examples decided."
        )
    if not numbers["importance"]:
        rung = [
            {**trial.values, "score": -early[n].target}
            for n, trial in trials.items()
            if n in early and math.isfinite(early[n].target)
        ]
        numbers["importance"] = importance(rung, knobs)
        if numbers["importance"]:
            notes.append(
                "How much each setting mattered was measured at the first look, because too few runs were trained to the end."
            )
    if shadow:
        _add_shadow(numbers, notes, first, second, final, survivors, goal, letters, trials)
    elif checked:
        better = [n for n in checked if survivors and final[n] > max(final[s] for s in survivors if s in final)]
        numbers["checked"] = {str(n): final[n] for n in checked}
        numbers["stopped runs that came out better"] = len(better)
        notes.append(
            f"Stopped runs that were trained to the end to check the rule: {', '.join(map(str, checked))}; "
            + (
                f"{', '.join(map(str, better))} came out better than every survivor."
                if better
                else "none came out better than the best survivor."
            )
        )
    return replace(plain, numbers=numbers, table=tuple(table), notes=tuple(notes))


def _add_shadow(
    numbers: dict[str, Any],
    notes: list[str],
    first: Sequence[Standing],
    second: Sequence[Standing],
    final: Mapping[int, float],
    survivors: Sequence[int],
    goal: str,
    letters: Mapping[str, str],
    trials: Mapping[int, Trial],
) -> None:
    """What the rule would have cost: regret, whether the best was lost at once, saved samples, and how well each signal foretold the end."""
    lost = halving.regret(final, survivors)
    best = max((n for n in final if math.isfinite(final[n])), key=lambda n: final[n], default=None)
    stopped_at = {d["trial"]: d["rung"] for d in numbers["decisions"] if not d["goes_on"] and d["by"] != BY_YOU}
    planned = sum(trial.marks[-1].planned_samples for trial in trials.values() if trial.marks)
    numbers["regret"] = _known(lost)
    numbers["best run stopped at the first look"] = best is not None and stopped_at.get(best) == min(
        (d["rung"] for d in numbers["decisions"]), default=0
    )
    numbers["share of examples it would have saved"] = (
        round(numbers["saved examples"] / planned, 4) if planned else None
    )
    chance = halving.random_regret(final, len(survivors))
    numbers["regret of as many survivors drawn at random"] = _known(chance)
    notes.append(
        f"Watched only: with the rule the best score would have been lower by {lost:.4g}; survivors drawn at random lose {chance:.4g} on average."
    )
    told: dict[str, Any] = {}
    for name, standings in (("first look", first), ("second look", second)):
        for group, signals in halving.foretold(standings, final, goal).items():
            told[f"{name}, group {letters.get(group, '–')}"] = {
                signal: {"correlation": _known(c.value), "low": _known(c.low), "high": _known(c.high), "runs": c.runs}
                for signal, c in signals.items()
            }
            if name == "first look" and signals["dynamics"].covers_zero:
                c = signals["dynamics"]
                notes.append(
                    f"In group {letters.get(group, '–')} early signals foretold nothing for certain (rank correlation {c.value:.2g}, from {c.low:.2g} to "
                    f"{c.high:.2g}, {c.runs} runs): switch them off there by setting the seats for early signals to 0."
                )
    numbers["correlations"] = told


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"A{place}"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
