"""The run doctor: looks after every run and says what is wrong, why, and what to do, with a way out that takes one click."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.core.method import Card, Cost, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.parts import doctor, signals
from engine.parts.doctor import Diagnosis, Plan
from engine.parts.signals import Heldout
from engine.parts.vitals import START_STEPS, Vitals
from engine.train.parts import Look, PartContext, Signal, Watcher

_DIALS = ("max_norm", "weight_decay", "dropout")  # of methods, that remedies may turn


class Doctor(Watcher):
    """Speaks as a pure function of the looks it was shown; each rule speaks once. Constant memory, some additions a step."""

    def __init__(self, params: RunDoctor.Params, plan: Plan) -> None:
        self.params, self.plan = params, plan
        self.vitals = Vitals()
        self._general: list[float] = []  # loss on general text and its standard error, at the start
        self._spoken: list[str] = []
        self._course = False  # something was found that explains the whole course of the run

    def see(self, look: Look) -> Iterator[Signal]:
        """Read a new row, then the measurement if one came with it. A row that is shown again with its measurement counts once."""
        if not self.params.active:
            return
        found: list[Diagnosis | None] = []
        if look.step > self.vitals.step and "loss" in look.row:
            found += self._read_row(look)
        if look.evaluation is not None:
            found += self._read_evaluation(look)
        for diagnosis in found:
            if diagnosis is not None and diagnosis.finding.rule not in self._spoken and not self._follows(diagnosis):
                self._spoken.append(diagnosis.finding.rule)
                self._course = self._course or diagnosis.course
                yield self._signal(diagnosis)

    def _follows(self, diagnosis: Diagnosis) -> bool:
        """Whether it only repeats what was said: one cause is named once, and not all of its consequences."""
        return self._course and diagnosis.consequence and not diagnosis.finding.grave

    def _signal(self, diagnosis: Diagnosis) -> Signal:
        found = diagnosis.finding
        stop = found.grave and self.params.may_stop
        return Signal(
            action="stop" if stop else "note" if diagnosis.note else "warn",
            rule=found.rule,
            message=found.message,
            numbers=found.numbers,
            remedy=diagnosis.remedy,
        )

    def _read_row(self, look: Look) -> list[Diagnosis | None]:
        v, row, plan = self.vitals, look.row, self.plan
        step = signals.read_step(row, look.step, look.samples, (v.samples, v.tokens))
        tokens = int(row.get("tokens") or 0)
        new_tokens, v.step, v.samples, v.tokens = tokens - v.tokens, look.step, look.samples, tokens
        if not (math.isfinite(step.loss) and math.isfinite(step.norm)):
            return [doctor.not_finite(step, v, plan, look)]
        epoch = float(row.get("epoch") or 0.0)
        v.per_epoch = max(1, round(look.step / epoch)) if epoch > 0 else 1
        nothing = step.loss == 0.0 and step.norm == 0.0
        v.empty += nothing
        v.still = v.still + 1 if step.norm == 0.0 and not nothing else 0
        if nothing:
            return [doctor.nothing_supervised(v, plan)]
        found: list[Diagnosis | None] = [doctor.nothing_supervised(v, plan), doctor.no_gradient(v)]
        self._follow_norm(look, step.norm, step.clipped)
        found += self._follow_loss(look, step.loss, step.weight, new_tokens)
        found += [doctor.clip_too_small(v, plan), doctor.too_noisy(v, plan), doctor.norm_shift(v)]
        return found

    def _follow_norm(self, look: Look, norm: float, clipped: float) -> None:
        v = self.vitals
        if norm > 0:
            size = math.log(norm)
            if v.norm.count >= 20 and look.step > look.warmup_steps:
                v.norm_rise.add(size, look.step, v.norm)
            v.norm.add(size)
        if clipped == clipped:
            v.clipped += clipped > 0
            limit = self.plan.dial("max_norm")
            if limit is not None and norm > 0:
                v.kept += (min(1.0, limit[1] / norm) - v.kept) / min(look.step, 30)

    def _follow_loss(self, look: Look, loss: float, weight: float, tokens: int) -> Iterator[Diagnosis | None]:
        v, plan = self.vitals, self.plan
        before = v.loss.last
        if v.loss.count >= 15 and look.step > look.warmup_steps:
            v.loss_rise.add(loss, look.step, v.loss)
        v.loss.add(loss)
        v.least = min(v.least, loss)
        if v.loss.count <= START_STEPS:
            v.start += (loss - v.start) / v.loss.count
            v.best, v.best_step = v.loss.fast, look.step
            return
        v.sameness.add(tokens, weight, loss - before)
        if v.loss.fast < v.best and v.loss.count >= 5:
            v.best, v.best_step, v.best_error = v.loss.fast, look.step, v.loss.fast_error
        sound = doctor.sound(v)
        high = v.start + min(max(0.15 * v.start, 4 * v.loss.fast_error), 0.5 * v.start)
        v.above_start = v.above_start + 1 if sound and v.loss.fast > high else 0
        lost = v.best + max(0.6 * (v.start - v.best), 0.1 * v.start, 5 * v.best_error)
        v.above_best = v.above_best + 1 if sound and v.loss.fast > lost and v.best < 0.9 * v.start else 0
        yield doctor.rate_too_high(v, plan, look)
        yield doctor.loss_broke(v, plan)
        if sound:
            yield doctor.loss_shift(v, plan)
            yield doctor.same_batch(v, plan)
            yield doctor.sorted_data(v)
        if v.per_epoch >= 16 and v.epoch.add(loss, look.step, v.per_epoch) and sound:
            yield doctor.epoch_jumps(v, plan)

    def _read_evaluation(self, look: Look) -> Iterator[Diagnosis | None]:
        v, plan, scores = self.vitals, self.plan, look.evaluation or {}
        now = signals.read_heldout(scores, look.samples)
        learners = scores.get("learners") or {}
        epoch = look.step / v.per_epoch
        if math.isfinite(now.target):
            v.held.add(now.target, now.target_se, look.step, epoch, v.loss.fast if v.loss.count else None)
            above = v.loss.count >= 10 and v.loss.fast - now.target > max(
                4 * math.hypot(v.loss.fast_error, v.held.last_error), 0.15 * now.target
            )
            v.held.above = v.held.above + 1 if above else 0
        size, count, share = (float(learners.get(name, math.nan)) for name in ("size", "count", "idle"))
        if v.held.size is None or count != v.held.learners:  # what learns may have changed: then it is measured anew
            v.held.size, v.held.learners, v.held.idle, v.held.fades = size, count, 0, 0
        v.held.moved = abs(size / v.held.size - 1) if v.held.size > 0 else 0.0
        fades = 0 < size < 0.6 * v.held.size and size < 0.97 * v.held.size_before
        v.held.fades, v.held.size_before = v.held.fades + 1 if fades else 0, size
        v.held.idle = v.held.idle + 1 if share >= 0.5 and v.step >= 3 else 0
        if look.step == 0:
            self._general = [now.general, now.general_se] if math.isfinite(now.general) else []
            return
        yield doctor.idle(share, v)
        yield doctor.fading(size, v, plan)
        yield doctor.worse_than_before(v, plan, look)
        yield doctor.rate_too_low(v, plan, look)
        yield doctor.plateau(v, plan, look)
        yield from self._labels(look, scores)
        yield doctor.over_fit(v, plan)
        yield doctor.by_heart(v, plan, epoch)
        yield doctor.handicapped(v, plan, look)
        yield doctor.too_easy(v, epoch)
        if self._general:
            start = Heldout(0, v.held.start or 0.0, v.held.start_error, *self._general)
            yield doctor.forgetting(start, now, v, plan, self.params.forgetting)

    def _labels(self, look: Look, scores: Mapping[str, Any]) -> Iterator[Diagnosis | None]:
        accuracy, f1 = scores.get("eval_accuracy"), scores.get("eval_macro_f1")
        if isinstance(accuracy, int | float) and isinstance(f1, int | float):
            alike = doctor.single_label(accuracy, f1, self.plan.classes)
            self.vitals.held.same_label = self.vitals.held.same_label + 1 if alike else 0
            yield doctor.one_answer(self.vitals.held.same_label, accuracy, look)

    def state_dict(self) -> dict[str, Any]:
        return {
            "vitals": self.vitals.state(),
            "general": list(self._general),
            "said": list(self._spoken),
            "course": self._course,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.vitals = Vitals.of(state["vitals"])
        self._general, self._spoken = list(state["general"]), list(state["said"])
        self._course = state["course"]


class RunDoctor(TrainMethod):
    """Looks after every run: says what goes wrong, why, and what to do."""

    slots = (Slot.WATCHER,)
    default = True
    presets = {"tiny": {}, "paper": {}}
    card = Card(
        slug="run-doctor",
        title="Run doctor",
        pick_when="Pick this when you want to be told at once that a run goes wrong, why, and what to do; it looks after every run unless it is switched off.",
        summary="It reads the numbers that every run writes anyway: the training error, the size of the corrections, and the scores on kept-back "
        "examples. When something is wrong it says in plain words what it sees, what that probably comes from and what to do, with a button that "
        "starts the better run. It finds a learning rate far too high or too low, explosions, examples with nothing to learn from, parts that never learn, "
        "learning by heart, forgetting, data in a bad order and more. It changes nothing in the run itself, and it stops a run only if you allow it.",
        family="Watchers",
        algorithm=(
            "Keep a quick and a slow average of the error and of the logarithm of the gradient norm, their noise from neighbouring steps, a CUSUM of each, "
            "eight means over the places of an epoch, and the start, the best and the last of the measurements: constant memory and time a step.",
            "After each step: not a number, nothing supervised, gradient exactly zero, error above its start, most of the gain lost, a lasting jump, a "
            "perfectly smooth fall, clipping to a small part, chance above signal.",
            "After each epoch: error tied to the place in the data, drops at the borders.",
            "After each measurement: parameters without a single correction, weights that shrink, hardly any change, nothing learned, one answer for all, "
            "kept-back examples that get harder, learning by heart, training examples harder than kept-back ones, solved too soon, forgetting.",
            "Each rule speaks once. When one finding explains the course of the run, its consequences are not told.",
        ),
        avoid_when="A search tries many settings on purpose, good and bad: it will then comment on the bad ones.",
        traps=(
            "It judges by the numbers alone and sees no example: the causes it names are the usual ones, not proven ones.",
            "Rules about the level of the error do not apply to losses that swing around zero, as when a model is rewarded for its attempts.",
            "A run of fewer than about thirty steps is too short for most rules.",
        ),
        cost=Cost(time=1, memory=1, size=1),
    )

    class Params(HyperParams):
        """What it may do."""

        active: bool = dial(
            True, label="Look after this run", tier="basic", help="Watches the run and says what goes wrong. Switched off, it says nothing."
        )  # fmt: skip
        may_stop: bool = dial(
            False,
            label="May end a hopeless run",
            help="Ends the run when it cannot come to anything any more, and keeps what was learned; otherwise it only warns.",
        )
        forgetting: float = dial(
            0.15,
            label="Forgetting",
            unit="share",
            low=0.0,
            high=10.0,
            help="Warns when the error on general text rises by more than this share.",
        )

    def parts(self, ctx: PartContext) -> Sequence[Watcher]:
        return [Doctor(self.params, plan_of(ctx))]


def plan_of(ctx: PartContext) -> Plan:
    """What remedies may change in this run's recipe."""
    settings = ctx.recipe.settings
    dials: dict[str, float] = {}
    for index, ref in enumerate(ctx.recipe.methods):
        params, _ = catalogue()[ref.slug].parse(ref.params, "")
        values = params.model_dump() if params is not None else {}
        dials |= {f"methods.{index}.params.{name}": float(values[name]) for name in _DIALS if name in values}
    return Plan(
        rate=settings.learning_rate or 0.0,
        epochs=settings.epochs or 1.0,
        batch=settings.batch_size or 1,
        accumulate=settings.accumulate,
        max_length=settings.max_length or 512,
        precision=settings.precision,
        classes=len(ctx.facts.data.labels),
        chance=_entropy(ctx.facts.data.label_counts),
        dials=dials,
    )


def _entropy(counts: Sequence[int]) -> float:
    """Of labels that come so often, in nats."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count) if total else 0.0
