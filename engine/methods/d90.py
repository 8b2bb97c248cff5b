"""d90: the smallest number of trained numbers that reaches nine tenths of what full fine-tuning reaches (arXiv 2012.13255)."""

from __future__ import annotations

import statistics
from collections.abc import Generator
from dataclasses import dataclass, field
from math import exp, isfinite, log, sqrt
from typing import Any, Literal, cast

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, FlowMethod, Suggestion
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.core.work import Outcome, Report, Step, StepResult
from engine.parts.optimizers import full_rate
from engine.parts.subspace import EVERYTHING, Shape, shape_faults, suggested_rate

_REFERENCE, _SUBSPACE = "full-finetuning", "said"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the full training reached, and what counts as good enough. Scores are larger for better: a share of right answers, or minus a loss."""

    full: float
    untouched: float
    floor: float  # where a share is counted from: the untouched score, or 0
    threshold: float

    @property
    def target(self) -> float:
        return self.floor + self.threshold * (self.full - self.floor)

    def share(self, score: float) -> float:
        """How much of the way from the floor to the full training a score is."""
        return (score - self.floor) / (self.full - self.floor)


@dataclass(kw_only=True)
class Point:
    """One size of the curve: the best score of every seed over the learning rates, and the run to take home."""

    d: int
    scores: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    best: StepResult | None = None
    best_score: float = float("-inf")

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores) if self.scores else float("-inf")

    @property
    def spread(self) -> float:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


class D90(FlowMethod):
    """Full fine-tuning, then the same training in random subspaces of growing size."""

    card = Card(
        slug="d90",
        title="Intrinsic dimension (d90)",
        pick_when="Pick this when you want to know how hard a task really is for a given model, or how small a file could hold what it learns: it "
        "counts how many numbers must change.",
        summary="The model is first trained in the ordinary way. Then the same training is repeated with only 10, 20, 50 … numbers that may change, "
        "spread at random over all weights, until the result is nine tenths as good. A small count means that the model already knew most of what the "
        "task needs. You get the curve, the count, and the smallest result that was good enough, as a file of a few kilobytes.",
        paper="Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        year=2020,
        arxiv="2012.13255",
        algorithm=(
            "Train with full fine-tuning (or the training that the recipe names): score_full. Its start is the untouched model.",
            "The target is threshold * score_full for a share of right answers, as in the paper. A loss has no natural zero: there the target is the "
            "threshold's share of the gain over the untouched model.",
            "For every d of a logarithmic grid, small ones first: train d numbers with SAID or DID, once for each learning rate and each seed of the "
            "random map; data, split, order and the other methods stay those of the full training.",
            "The score of d is the best over the learning rates, averaged over the seeds.",
            "d90 is the smallest d that reaches the target. Stop there, or measure the whole curve.",
            "If wished, halve the gap between the last miss and the first hit a few times, on the logarithmic scale.",
            "Take home the best run of d90: seed, z and scales; and the merged model.",
        ),
        avoid_when="You only want a good result: this trains a dozen times. Or the model has more than about 10 million numbers and there is only a CPU.",
        traps=(
            "d90 is an upper bound for this family of maps, these learning rates and this number of steps: too few steps or a poor rate inflate it.",
            "The useful learning rate falls as d grows; here the rates are multiples of a suggestion that falls with sqrt(d).",
            "Nine tenths of a score says little when guessing already gives eight: then measure the gain over the untouched model instead.",
            "One map by tensor and one over all weights give different counts; so do SAID and DID. Compare only what was measured alike.",
            "A new classifier lies inside the subspace by default, so that d is the true count; set free it may hold more numbers than d.",
            "The kept-back examples choose d90 and the learning rate, so the score of the result is a little flattering.",
        ),
        figures=(
            Figure(claim="RoBERTa-Large on MRPC, SAID and DID", paper="207, 322 (Table 1)"),
            Figure(claim="RoBERTa-Base on MRPC, SAID and DID", paper="896, 1000 (Table 1)"),
            Figure(claim="BERT-Large on QQP, SAID and DID", paper="1200, 1389 (Table 1)"),
            Figure(
                claim="d90 of a pretrained start against the same network re-initialised",
                paper="falls as pretraining of RoBERTa-Base goes on, six tasks (figure)",
                ours="64 against 211 numbers with DID, 58 against 192 with SAID (digits, 3 seeds). Measured by the share of its own gain in loss it is the "
                "other way round for a small language model in 30 steps: 3,000 numbers reach 59 % pretrained, 96 % re-initialised (2 seeds)",
            ),
        ),
        cost=Cost(time=5, memory=4, size=1),
        family="Subspaces",
    )
    training = "optional"
    presets = {
        "tiny": {"low": 10, "high": 300, "count": 2, "rates": "1"},
        "paper": {"low": 10, "high": 10_000, "count": 10, "seeds": 3, "rates": "0.3, 1, 3", "measure": "score"},
    }

    class Params(HyperParams):
        """Hyperparameters of the search for d90."""

        low: int = dial(
            10, label="Fewest numbers", unit="numbers", low=2, high=1_000_000, tier="basic", paper=10,
            help="The smallest count that is tried.",
        )  # fmt: skip
        high: int = dial(
            10_000, label="Most numbers", unit="numbers", low=2, high=1_000_000, tier="basic", paper=10_000,
            help="The largest count that is tried.",
        )  # fmt: skip
        count: int = dial(
            7, label="Counts to try", unit="counts", low=2, high=50, tier="basic", paper="10 to 25",
            help="How many counts between the two are tried, in equal factors. Each costs a training for every rate and seed.",
        )  # fmt: skip
        threshold: float = dial(
            0.9, label="Good enough", unit="share", low=0.5, high=1.0, paper=0.9,
            help="The share of the full training's score (or gain) that counts as reached.",
        )  # fmt: skip
        measure: Literal["auto", "score", "gain"] = dial(
            "auto", label="Share of what", paper="score",
            help="score: of the full training's score. gain: of what it gains over the untouched model. auto: score for right answers, gain for losses.",
        )  # fmt: skip
        rates: str = dial(
            "1, 3", label="Learning rates", paper="several",
            help="Multiples of the suggested learning rate, with commas between them; each is tried at every count.",
        )  # fmt: skip
        seeds: int = dial(
            1, label="Random maps", unit="maps", low=1, high=50, paper=3,
            help="How many random maps are tried at every count; the scores are averaged.",
        )  # fmt: skip
        refine: int = dial(
            0, label="Closer looks", unit="times", low=0, high=10,
            help="How often the gap between the last miss and the first hit is halved afterwards.",
        )  # fmt: skip
        whole_curve: bool = dial(
            False, label="Measure the whole curve", paper=True,
            help="Goes on to the largest count even when a smaller one was good enough.",
        )  # fmt: skip
        mode: Literal["said", "did"] = dial(
            "said", label="Scale the layers", paper="said",
            help="said gives up a few of the numbers for one scale a layer; did has none.",
        )  # fmt: skip
        scales: Literal["layer", "tensor"] = dial(
            "layer", label="What has a scale", paper="layer",
            help="With said: one scale for each layer, or one for each single tensor.",
        )  # fmt: skip
        head: Literal["inside", "free"] = dial(
            "inside", label="A new classifier", paper="inside (unconfirmed)",
            help="inside: it moves along the same random directions. free: all its numbers learn, on top of the count.",
        )  # fmt: skip
        spread: Literal["tensor", "whole"] = dial(
            "tensor", label="Random map", paper="tensor",
            help="tensor: each tensor has its own map. whole: one map over everything, so that large tensors move further.",
        )  # fmt: skip
        projection: Literal["fastfood", "dense"] = dial(
            "fastfood", label="Kind of map", paper="fastfood",
            help="fastfood needs hardly any memory; dense is a plain random matrix, for small models only.",
        )  # fmt: skip
        targets: str = dial(
            EVERYTHING, label="Weights", paper=EVERYTHING,
            help="Which weights may move: all, all-linear, attention, feed-forward, or names of layers with commas between them.",
        )  # fmt: skip

    # ── before anything runs ──────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return 1.0 + (params.count + params.refine) * params.seeds * max(1, len(multiples(params.rates)))

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        if params.low >= params.high:
            return [
                Fault(
                    where="low", code="empty_range",
                    what=f"The fewest numbers, {params.low:,}, are not below the most, {params.high:,}.",
                    why="A curve needs at least two counts.", way_out=f"Choose a number below {params.high:,}.",
                )
            ]  # fmt: skip
        faults = []
        if not multiples(params.rates):
            faults.append(
                Fault(
                    where="rates", code="not_a_number",
                    what=f"'{params.rates[:60]}' names no learning rates.",
                    why="They are positive numbers with commas between them: multiples of the suggested rate.",
                    way_out="Write 1, or 0.3, 1, 3.",
                )
            )  # fmt: skip
        for where, d in (("low", params.low), ("high", params.high)):
            scales = params.scales if params.mode == "said" else "none"
            shape = Shape(d=d, scales=cast(Any, scales), spread=params.spread, projection=params.projection)
            found = shape_faults(shape, params.targets, facts, where)
            faults += [fault for fault in found if fault.where not in {item.where for item in faults}]
        return faults

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        rate = full_rate(facts.model)
        reason = f"It is the rate of the full training; {rate:g} suits a model of {facts.model.num_parameters:,} parameters. The small trainings have their own."
        return [Suggestion(where="settings.learning_rate", value=rate, reason=reason)]

    # ── the flow ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, ctx: Any) -> Generator[Step | list[Step], Any, Outcome]:
        """Full training, the grid, the closer looks, and what they say together."""
        p = self.params
        inner = [(ref.slug, dict(ref.params)) for ref in ctx.inner.methods] or [(_REFERENCE, {})]
        reference: StepResult = yield Step(
            name="full", title="the full training, to compare with", recipe=ctx.train(inner)
        )
        goal = self._goal(ctx, reference)
        ctx.forget(reference)
        beside = [(slug, params) for slug, params in inner if Slot.PARAMETRIZATION not in catalogue()[slug].slots]

        points: list[Point] = []
        for d in grid(p.low, p.high, p.count):
            points.append((yield from self._point(ctx, d, goal, beside)))
            self._prune(ctx, points, goal)
            if points[-1].score >= goal.target and not p.whole_curve:
                break
        for _ in range(p.refine):
            middle = between(points, goal.target)
            if middle is None:
                break
            points.append((yield from self._point(ctx, middle, goal, beside)))
            points.sort(key=lambda point: point.d)
            self._prune(ctx, points, goal)
        return self._outcome(ctx, points, goal)

    def _goal(self, ctx: Any, reference: StepResult) -> Goal:
        full = float(ctx.task.goodness(reference.metrics)[0])
        untouched = float(ctx.task.goodness(reference.description["before"])[0])
        if full <= untouched:
            raise bad_input(
                "settings.learning_rate",
                f"The full training learns nothing: {shown(untouched)} before, {shown(full)} after.",
                "Without a gain there is nothing of which nine tenths could be reached.",
                "Give it more passes over the data, another learning rate, or other data.",
                "no_gain",
            )
        wanted = self.params.measure
        kind = ("score" if full > 0 else "gain") if wanted == "auto" else wanted
        if kind == "score" and full <= 0:
            raise bad_input(
                "params.measure",
                "A share of a loss means nothing.",
                "A loss has no natural zero.",
                "Choose gain, or auto.",
                "no_zero",
            )
        goal = Goal(
            full=full, untouched=untouched, floor=untouched if kind == "gain" else 0.0, threshold=self.params.threshold
        )
        if untouched >= goal.target:
            ctx.note(
                f"The untouched model already has {shown(untouched)}, which is good enough by the measure '{kind}': every count will be. "
                "Choose the measure gain.",
                "warning",
            )
        return goal

    def _point(
        self, ctx: Any, d: int, goal: Goal, beside: list[tuple[str, dict[str, Any]]]
    ) -> Generator[Step, StepResult, Point]:
        """All rates and seeds of one count. A seed that is good enough needs no further rate, unless the curve itself is wanted."""
        p, point = self.params, Point(d=d)
        for seed in range(p.seeds):
            best, best_rate = float("-inf"), 0.0
            for multiple in multiples(p.rates):
                rate = suggested_rate(d) * multiple
                lead = (_SUBSPACE, self._subspace(d, ctx.seed + seed))
                result = yield Step(
                    name=f"d{d}-map{seed + 1}-rate{multiple:g}",
                    title=f"{d:,} numbers, map {seed + 1}, learning rate {rate:.3g}",
                    recipe=ctx.train([lead, *beside], learning_rate=min(rate, 10.0)),
                    may_fail=True,
                )
                score = float(ctx.task.goodness(result.metrics)[0]) if result.ok else float("-inf")
                if not isfinite(score):
                    continue
                if score > best:
                    best, best_rate = score, rate
                if score > point.best_score:
                    if point.best is not None:
                        ctx.forget(point.best)
                    point.best, point.best_score = result, score
                else:
                    ctx.forget(result)
                if best >= goal.target and not p.whole_curve:
                    break
            point.scores.append(best)
            point.rates.append(best_rate)
        return point

    def _subspace(self, d: int, seed: int) -> dict[str, Any]:
        p = self.params
        return {"d": d, "mode": p.mode, "scales": p.scales, "head": p.head, "spread": p.spread, "projection": p.projection,
                "targets": p.targets, "map_seed": seed}  # fmt: skip

    def _prune(self, ctx: Any, points: list[Point], goal: Goal) -> None:
        """Only the run that would be taken home now keeps its weights."""
        keep = chosen(points, goal.target)
        for point in points:
            if point.best is not None and point is not keep:
                ctx.forget(point.best)

    def _outcome(self, ctx: Any, points: list[Point], goal: Goal) -> Outcome:
        p, home = self.params, chosen(points, goal.target)
        hit = home.score >= goal.target
        if home.best is None:
            raise bad_input(
                "params.rates",
                "No training in a subspace came to an end.",
                "Every one of them diverged.",
                "Choose smaller multiples of the learning rate.",
                "all_failed",
            )
        size, examples = ctx.facts.model.num_parameters, int(home.best.description["data"]["num_train"])
        aim = f"{p.threshold:.0%} of what the full training {'reaches' if goal.floor == 0 else 'gains over the untouched model'}"
        name = p.mode.upper()
        if hit:
            sentence = (
                f"{home.d:,} numbers ({name}) are enough for {aim}: {shown(home.score)}, where the full training of {size:,} numbers has "
                f"{shown(goal.full)} and the untouched model {shown(goal.untouched)}."
            )
        else:
            sentence = (
                f"No count up to {max(point.d for point in points):,} ({name}) reaches {aim}; the best is {shown(home.score)} with {home.d:,} numbers, "
                f"the aim was {shown(goal.target)}."
            )
        rows = tuple(
            {"d": point.d, "score": point.score, "share": goal.share(point.score), "spread": point.spread, "runs": len(point.scores),
             "learning rate": statistics.median(point.rates), "good enough": point.score >= goal.target}
            for point in sorted(points, key=lambda point: point.d)
        )  # fmt: skip
        notes = [
            "d90 is an upper bound for this kind of map, these learning rates and this number of steps.",
            f"Measured as {'a share of the gain over the untouched model' if goal.floor else 'a share of the score itself'}, on the kept-back examples.",
        ]
        missed = sum(not isfinite(score) for point in points for score in point.scores)
        if missed:
            notes.append(f"{missed} maps diverged at every learning rate and count as misses.")
        report = Report(
            title="Intrinsic dimension",
            sentence=sentence,
            numbers={"d90": home.d if hit else None, "full": goal.full, "untouched": goal.untouched, "target": goal.target,
                     "threshold": p.threshold, "model": size, "examples": examples,
                     "bound": round(sqrt(home.d / max(1, examples)), 4)},
            table=rows,
            curve=("d", "score"),
            notes=tuple(notes),
        )  # fmt: skip
        return Outcome(message=sentence, take=home.best, report=report)


def multiples(text: str) -> tuple[float, ...]:
    """The positive numbers in a text with commas between them; empty when anything else stands there."""
    try:
        found = tuple(float(piece) for piece in text.split(",") if piece.strip())
    except ValueError:
        return ()
    return found if all(isfinite(value) and value > 0 for value in found) else ()


def grid(low: int, high: int, count: int) -> list[int]:
    """Whole numbers from low to high in equal factors, each once."""
    step = (log(high) - log(low)) / (count - 1)
    return sorted({round(exp(log(low) + step * place)) for place in range(count)})


def between(points: list[Point], target: float) -> int | None:
    """The count half-way (in factors) between the first hit and the last miss below it; None when nothing lies between."""
    hits = [point.d for point in points if point.score >= target]
    misses = [point.d for point in points if point.score < target and hits and point.d < min(hits)]
    if not hits or not misses:
        return None
    middle = round(sqrt(min(hits) * max(misses)))
    return middle if max(misses) < middle < min(hits) else None


def chosen(points: list[Point], target: float) -> Point:
    """The smallest count that is good enough; when none is, the one with the best score."""
    hits = [point for point in points if point.score >= target]
    return min(hits, key=lambda point: point.d) if hits else max(points, key=lambda point: (point.score, -point.d))


def shown(score: float) -> str:
    """A score as a person reads it: a share of right answers, or a loss."""
    return f"{score:.1%} right" if score >= 0 else f"a loss of {-score:.3f}"
