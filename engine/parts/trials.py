"""What searches share: values to try, minutes that are left, the best trial, a table of trials, and how much each setting mattered. No torch."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.core.errors import EngineError, Fault
from engine.core.params import dial
from engine.core.recipe import Recipe
from engine.core.space import Knob, parse_space
from engine.core.work import Ask, Report, Trial

LEAST_FOR_IMPORTANCE = 6  # scores of fewer trials say nothing about single settings
MOST_COMBINATIONS = 500


def space_dial() -> Any:
    """The dial for the ranges, worded alike in every search that needs no live change."""
    return dial(
        "learning_rate", label="What may change", tier="basic",
        help="Which settings to try, with commas between them: a name alone, or a name with its range or its values, such as "
        "learning_rate=1e-5..1e-2, batch_size=8|16|32, lora.r=4|8|16.",
    )  # fmt: skip


def minutes_dial() -> Any:
    """The dial for the time a search may take."""
    return dial(
        0.0, label="Minutes at most", unit="minutes", low=0.0, high=100_000.0, tier="basic",
        help="After this time no further trial begins, and the best so far is the result; 0 means no limit.",
    )  # fmt: skip


# ── what to try ───────────────────────────────────────────────────────────────────────────────────────────────────────


def levels(knob: Knob, points: int) -> tuple[Any, ...]:
    """The values of a knob on a grid: its choices, or `points` values from end to end, evenly spaced in factors where the range is wide."""
    if knob.choices:
        return knob.choices
    if points == 1:
        middle = math.sqrt(knob.low * knob.high) if knob.is_log else (knob.low + knob.high) / 2
        return (knob.clip(middle),)
    shares = [place / (points - 1) for place in range(points)]
    if knob.is_log:
        values = [knob.clip(knob.low * (knob.high / knob.low) ** share) for share in shares]
    else:
        values = [knob.clip(knob.low + (knob.high - knob.low) * share) for share in shares]
    return tuple(dict.fromkeys(values))  # whole numbers may coincide


def grid(knobs: Sequence[Knob], points: int) -> list[dict[str, Any]]:
    """Every combination of the levels, the last knob turning fastest."""
    names = [knob.name for knob in knobs]
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*(levels(knob, points) for knob in knobs))]


def draws(knobs: Sequence[Knob], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` different draws from the ranges; fewer where the space has fewer combinations."""
    found: list[dict[str, Any]] = []
    for _ in range(20 * count):
        values = {knob.name: knob.draw(rng) for knob in knobs}
        if values not in found:
            found.append(values)
        if len(found) == count:
            break
    return found


def count_combinations(space: str, points: int) -> int:
    """How many combinations a space has, from its text alone: values behind |, and `points` for every range."""
    total = 1
    for item in filter(None, (piece.strip() for piece in space.split(","))):
        span = item.partition("=")[2]
        total *= len(span.split("|")) if "|" in span else points
    return total


def space_faults(space: str, recipe: Recipe, points: int = 1) -> list[Fault]:
    """What is wrong with the ranges of a search whose trials are built anew, so that any number may change."""
    _, faults = parse_space(space, recipe)
    count = count_combinations(space, points)
    if not faults and count > MOST_COMBINATIONS:
        faults.append(
            Fault(
                where="space",
                what=f"These values make {count:,} combinations.",
                why=f"Every combination is a training of its own; more than {MOST_COMBINATIONS} are never worth it.",
                way_out="Name fewer settings or fewer values, or let the trials be drawn at random.",
                code="too_many",
            )
        )
    return faults


# ── how it goes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def next_of(
    plan: Sequence[dict[str, Any]],
    trials: Sequence[Trial],
    steps_of: Callable[[Mapping[str, Any]], int],
    max_minutes: float,
) -> list[Ask]:
    """The next trial of a plan that was made beforehand, trained to its end; nothing when the plan or the minutes are over."""
    if len(trials) >= len(plan) or is_over(trials, max_minutes):
        return []
    values = plan[len(trials)]
    return [Ask(trial=len(trials), until=steps_of(values), values=values)]


def is_over(trials: Sequence[Trial], max_minutes: float) -> bool:
    """Whether the minutes are used up. Read from the record, so that an interrupted search decides the same again; 0 minutes are no limit."""
    elapsed = max((mark.elapsed for trial in trials for mark in trial.marks), default=0.0)
    return bool(trials) and 0 < max_minutes * 60 <= elapsed


def best_trial(trials: Sequence[Trial], score: Callable[[Trial], float] = lambda trial: trial.score) -> int:
    """The best of the trials that went furthest, as a share of their own length; an error in a sentence when every one of them broke down."""
    alive = [trial for trial in trials if trial.marks and not trial.failed]
    if not alive:
        raise EngineError(
            Fault(
                where="space",
                what="Every trial broke down.",
                why="The settings that were tried make the training diverge.",
                way_out="Choose a lower range for the learning rate.",
                code="all_failed",
            ),
            "diverged",
        )
    alive = [
        trial for trial in alive if not trial.is_stopped
    ] or alive  # a person wanted none of those that are stopped
    far = max(progress(trial) for trial in alive)
    return max((t for t in alive if progress(t) == far), key=lambda trial: (score(trial), -trial.number)).number


def overridden(trials: Sequence[Trial]) -> list[str]:
    """What people decided about single trials, as a sentence for the report; nothing where nobody did."""
    said = []
    for word, chosen in (("kept", "keep"), ("stopped", "stop")):
        made = [t.override for t in trials if t.override is not None and t.override.verdict == chosen]
        if made:
            said.append(f"{word.capitalize()} by you: " + ", ".join(f"trial {o.trial} ({o.by})" for o in made) + ".")
    return said


def progress(trial: Trial) -> float:
    """How much of its own length a trial has gone, from 0 to 1."""
    if not trial.marks:
        return 0.0
    return min(1.0, trial.step / trial.marks[-1].total_steps) if trial.marks[-1].total_steps else float(trial.step)


def is_finished(trial: Trial) -> bool:
    """Whether it has trained to its end."""
    return bool(trial.marks) and not trial.failed and progress(trial) >= 1.0


def samples_of(trials: Sequence[Trial]) -> int:
    """Examples that were processed in all; a trial that broke down counts up to its last good mark."""
    return sum(max((mark.samples for mark in trial.marks), default=0) for trial in trials)


def full_samples(trials: Sequence[Trial], planned: int) -> int:
    """Examples that `planned` whole trials read, from the mean plan of those that ran."""
    plans = [max(mark.planned_samples for mark in trial.marks) for trial in trials if trial.marks]
    plans = [plan for plan in plans if plan > 0]
    return round(planned * sum(plans) / len(plans)) if plans else 0


# ── what came out ─────────────────────────────────────────────────────────────────────────────────────────────────────


def row_of(trial: Trial, knobs: Sequence[Knob], state: str) -> dict[str, Any]:
    """A line of the table: the trial, its settings, how far it went, and how it scored (None for what is not known)."""
    heldout: Mapping[str, float] = trial.marks[-1].heldout if trial.marks else {}
    row: dict[str, Any] = {
        "trial": trial.number,
        **{knob.name: trial.values.get(knob.name) for knob in knobs},
        "step": trial.step,
        "examples": max((mark.samples for mark in trial.marks), default=0),
        "score": trial.score if math.isfinite(trial.score) else None,
        "held-out loss": heldout.get("eval_loss"),
    }
    if "general_loss" in heldout:
        row["general loss"] = heldout["general_loss"]
    return {**row, "state": state}


def importance(rows: Sequence[Mapping[str, Any]], knobs: Sequence[Knob], score: str = "score") -> dict[str, float]:
    """How much of the differences in the score each setting explains, from 0 to 1, in sum 1; empty below six scored rows or without differences.

    Functional ANOVA on a random forest (Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance"), as in optuna, seeded. A knob
    that took one value only explains nothing.
    """
    scored = [row for row in rows if isinstance(row.get(score), int | float)]
    turned = [knob for knob in knobs if len({row[knob.name] for row in scored}) > 1]
    if len(scored) < LEAST_FOR_IMPORTANCE or not turned or len({row[score] for row in scored}) < 2:
        return {}
    optuna = quiet_optuna()
    shapes = {knob.name: distribution(knob) for knob in turned}
    study = optuna.create_study(direction="maximize")
    for row in scored:
        values = {knob.name: row[knob.name] for knob in turned}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=shapes, value=float(row[score])))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {knob.name: round(float(found.get(knob.name, 0.0)), 4) for knob in knobs}


def search_report(
    title: str,
    trials: Sequence[Trial],
    winner: int,
    knobs: Sequence[Knob],
    *,
    planned: int,
    stands: Callable[[Trial], str],
    said: str = "",
    notes: Sequence[str] = (),
) -> Report:
    """The report of a search whose trials are independent runs. planned: how many it meant to run; said: a further sentence."""
    rows = tuple(row_of(trial, knobs, stands(trial)) for trial in sorted(trials, key=lambda trial: trial.number))
    best = next(trial for trial in trials if trial.number == winner)
    done = [row for row, trial in zip(rows, sorted(trials, key=lambda t: t.number), strict=True) if is_finished(trial)]
    scores = [row["score"] for row in done if row["score"] is not None]
    span = f" ({min(scores):.4g} to {max(scores):.4g} in all)" if len(scores) > 1 else ""
    settings = ", ".join(f"{short(knob.name)} {number(best.values.get(knob.name))}" for knob in knobs)
    weights = importance(done, knobs)
    full = full_samples(trials, planned)
    numbers: dict[str, Any] = {
        "winner": winner,
        "score": best.score if math.isfinite(best.score) else None,
        "values": dict(best.values),
        "trials": len(trials),
        "planned": planned,
        "finished": len(done),
        "examples": samples_of(trials),
        "share of all examples": round(samples_of(trials) / full, 4) if full else None,
        "importance": weights,
    }
    missing = planned - len(trials)
    told = [*notes, *overridden(trials)]
    if missing > 0:
        told.append(
            f"{missing} of the {planned} trials that were planned did not begin, because the search was ended before."
        )
    return Report(
        title=title,
        sentence=f"Trial {winner} of {len(trials)} is the best, with {settings}: its score is {best.score:.4g}{span}.{f' {said}' if said else ''}",
        numbers=numbers, table=rows, knobs=tuple(knob.name for knob in knobs), score="score", notes=tuple(told),
    )  # fmt: skip


def short(name: str) -> str:
    """A setting as a person calls it: "learning rate", "lora.r"."""
    return name.removeprefix("settings.").replace("_", " ")


def number(value: Any) -> str:
    """A value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ── optuna ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def quiet_optuna() -> Any:
    """The library, loaded when it is first needed (half a second), without its own lines in the log."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def distribution(knob: Knob) -> Any:
    """A knob in optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if knob.choices:
        return CategoricalDistribution(knob.choices)
    if knob.whole:
        return IntDistribution(round(knob.low), round(knob.high), log=knob.is_log)
    return FloatDistribution(knob.low, knob.high, log=knob.is_log)
