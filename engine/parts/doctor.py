"""What is wrong with a run, why, and the way out: rules that read the vital signs. Pure functions; each gives a Diagnosis or nothing.

Every rule says what is seen with its numbers, the probable cause, and what to do, and names a remedy where one click can be one. The limits are ours; the
study `doctor` measures how often they find what is there and how often they cry for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.parts import signals
from engine.parts.signals import Finding, Heldout, Step
from engine.parts.vitals import Vitals
from engine.train.parts import Look, Remedy

GOOD, BEGINNING = "last_good", "beginning"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a remedy may change: the settings of the run, and dials of its methods by their dotted recipe names."""

    rate: float
    epochs: float
    batch: int
    accumulate: int
    max_length: int
    precision: str = "fp32"
    classes: int = 0  # labels of the data, 0 where there are none
    chance: float = 0.0  # error of an answer by the frequency of the labels alone, in nats; 0 where there are none
    dials: Mapping[str, float] = field(default_factory=dict)  # "methods.0.params.max_norm" -> value

    @property
    def behind(self) -> str:
        """How many examples stand behind a correction, in words."""
        count = self.batch * self.accumulate
        return "one example" if count == 1 else f"{count} examples"

    def dial(self, ending: str) -> tuple[str, float] | None:
        """The name and value of a method's dial, or None where no method has it."""
        return next(((name, value) for name, value in self.dials.items() if name.endswith(f".{ending}")), None)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A finding, with the remedy that belongs to it. course: it explains the course of the run so far, so that its consequences need not be said;
    consequence: it may be one."""

    finding: Finding
    remedy: Remedy | None = None
    note: bool = False
    course: bool = False
    consequence: bool = False


def diagnosis(
    rule: str, seen: str, cause: str, advice: str, *, remedy: Remedy | None, grave: bool = False, note: bool = False,
    course: bool = False, consequence: bool = False, **numbers: Any,
) -> Diagnosis:  # fmt: skip
    """A finding in three steps: what is seen, what it probably comes from, what to do."""
    return Diagnosis(
        finding=Finding(rule, grave, f"{seen} {cause} {advice}", numbers),
        remedy=remedy,
        note=note,
        course=course,
        consequence=consequence,
    )


# ── remedies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def other_rate(plan: Plan, factor: float, start: str) -> Remedy | None:
    """Another learning rate, `factor` times that of the plan."""
    rate = float(f"{plan.rate * factor:.2g}")
    if not 0 < rate <= 10:
        return None
    where = "the last good checkpoint" if start == GOOD else "the beginning"
    return Remedy(
        title=f"Restart from {where} with a learning rate of {rate:g}",
        start="last_good" if start == GOOD else "beginning",
        changes={"settings.learning_rate": rate},
    )


def fewer_passes(plan: Plan, epochs: float) -> Remedy | None:
    """As many passes as went well."""
    epochs = float(f"{max(0.05, epochs):.2g}")
    if epochs >= plan.epochs:
        return None
    return Remedy(
        title=f"Restart from the beginning with {epochs:g} pass{'' if epochs == 1 else 'es'} over the data",
        start="beginning",
        changes={"settings.epochs": epochs},
    )


def larger_batch(plan: Plan, factor: int) -> Remedy | None:
    """More examples behind every correction, in no more memory."""
    count = plan.accumulate * factor
    if count > 1024:
        return None
    return Remedy(
        title=f"Restart from the beginning with {plan.batch * count} examples behind every correction",
        start="beginning",
        changes={"settings.accumulate": count},
    )


def longer_texts(plan: Plan) -> Remedy | None:
    """Texts that are cut later, so that their ends are seen."""
    length = min(131072, plan.max_length * 2)
    return Remedy(
        title=f"Restart from the beginning with texts of up to {length:,} tokens", start="beginning", changes={"settings.max_length": length}
    )  # fmt: skip


def turned(plan: Plan, ending: str, value: float, words: str, start: str = BEGINNING) -> Remedy | None:
    """Another value of a method's dial."""
    found = plan.dial(ending)
    if found is None:
        return None
    where = "the last good checkpoint" if start == GOOD else "the beginning"
    return Remedy(
        title=f"Restart from {where} with {words} of {value:g}",
        start="last_good" if start == GOOD else "beginning",
        changes={found[0]: value},
    )


# ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def not_finite(step: Step, vitals: Vitals, plan: Plan, look: Look) -> Diagnosis | None:
    """Loss or norm is no number: which of them came first, and whether the run was calm before."""
    found = signals.not_finite(step)
    if found is None:
        return None
    loss_went = not math.isfinite(step.loss)
    restless = vitals.loss.count >= 3 and (
        vitals.loss.fast > 1.2 * vitals.start or vitals.norm.last > vitals.norm.slow + max(1.5, 4 * vitals.norm.noise)
    )
    early = look.step <= max(3, 0.1 * look.planned_steps)
    if loss_went:
        first, seen = "loss", f"At step {look.step:,} the training error itself stopped being a number"
    elif step.loss == 0:
        first, seen = (
            "zero_loss",
            f"At step {look.step:,} the training error is exactly zero and its correction is not a number",
        )
    else:
        first = "grad_norm"
        seen = f"At step {look.step:,} the training error was still a number ({step.loss:.3g}), but the correction computed from it was not"
    remedy = other_rate(plan, 0.1, BEGINNING if early else GOOD)
    if first == "zero_loss":
        seen += "."
        cause = "Probably no example of this step had anything to learn from, for instance because every answer was cut off."
        advice = "Let the texts be longer, or look at the data."
        remedy = longer_texts(plan)
    elif restless or early:
        seen += f"; before, the error was {vitals.loss.fast:.3g} and restless." if vitals.loss.count else "."
        cause, advice = "The learning rate is probably too high.", "Start again with a tenth of it."
    elif plan.precision == "bf16":
        seen += ", although the run had been calm."
        cause = "Probably a number grew too large for the short number format, or the data hold an extreme value."
        advice = "Go on from the last good checkpoint in the full format."
        remedy = Remedy(
            title="Restart from the last good checkpoint in fp32", start="last_good", changes={"settings.precision": "fp32"}
        )  # fmt: skip
    else:
        seen += ", although the run had been calm."
        cause = "So this step's examples probably hold something extreme: an empty or broken text, or a number that is far too large."
        advice = "Look at the data; a tenth of the learning rate often gets past the place."
    numbers = {**found.numbers, "first": first}
    return Diagnosis(
        finding=replace(found, message=f"{seen} {cause} {advice}", numbers=numbers), remedy=remedy, course=True
    )


def nothing_supervised(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """Steps in which no item counted."""
    if vitals.empty < 3 or vitals.empty < 0.2 * vitals.step:
        return None
    everything = vitals.empty == vitals.step
    return diagnosis(
        "nothing-to-learn",
        f"In {vitals.empty} of {vitals.step} steps so far nothing in the examples was there to be learned: error and correction were exactly zero.",
        "Probably the answers lie behind the point at which texts are cut, or the chat template marks no part of them as an answer.",
        "Let the texts be longer, and look at an example on the data page.",
        remedy=longer_texts(plan), grave=everything, course=everything, empty=vitals.empty, steps=vitals.step,
    )  # fmt: skip


def no_gradient(vitals: Vitals) -> Diagnosis | None:
    """There is an error, and no correction follows from it."""
    if vitals.still < 4:
        return None
    return diagnosis(
        "no-gradient",
        f"For {vitals.still} steps the correction has been exactly zero, although there is an error of {vitals.loss.fast:.3g}.",
        "What should learn is cut off from the error: it starts at zero on both sides, is frozen, or the model does not use it.",
        "This will not mend itself. Choose another method, or other layers for this one.",
        remedy=None, grave=True, course=True, steps=vitals.still,
    )  # fmt: skip


def rate_too_high(vitals: Vitals, plan: Plan, look: Look) -> Diagnosis | None:
    """The loss rose above its start soon, before anything was gained."""
    began = look.step - vitals.above_start
    if vitals.above_start < HOLD or began > look.warmup_steps + max(12, 0.15 * look.planned_steps):
        return None
    return diagnosis(
        "rate-too-high",
        f"The training error rose from {vitals.start:.3g} at the start to {vitals.loss.fast:.3g} and stays there.",
        f"The corrections overshoot: the learning rate of {plan.rate:g} is probably far too high, or it begins at full size where a gentle rise is needed.",
        "Start again with a tenth of it.",
        remedy=other_rate(plan, 0.1, BEGINNING), grave=vitals.loss.fast > 1.5 * vitals.start and vitals.above_start >= 4 * HOLD, course=True,
        start=vitals.start, now=vitals.loss.fast, steps=vitals.above_start,
    )  # fmt: skip


HOLD = 6


def loss_broke(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """Most of what had been gained was lost again."""
    if vitals.above_best < HOLD:
        return None
    return diagnosis(
        "loss-broke",
        f"The training error had come down from {vitals.start:.3g} to {vitals.best:.3g} by step {vitals.best_step:,}; now it is {vitals.loss.fast:.3g} again.",
        "Either one correction threw the model off its path, because the learning rate is too high for this stage, or the examples have become harder.",
        "Go on from the last good checkpoint with a lower learning rate.",
        remedy=other_rate(plan, 0.2, GOOD), course=True, start=vitals.start, best=vitals.best, best_step=vitals.best_step, now=vitals.loss.fast,
    )  # fmt: skip


def loss_shift(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """The loss jumped to a new level and stays (CUSUM)."""
    rise = vitals.loss_rise
    height = vitals.loss.fast - rise.level
    if rise.total < ALARM or height < max(4 * rise.noise / math.sqrt(8), 0.15 * abs(rise.level)):
        return None
    harder = vitals.norm.fast > vitals.norm.slow + 0.2
    return diagnosis(
        "loss-shift",
        f"Since step {rise.since:,} the training error stands clearly higher than before: {vitals.loss.fast:.3g} instead of {rise.level:.3g}"
        + (", and the corrections have grown with it." if harder else "."),
        "Probably the examples from there on are of another kind (another source, language or length), or the model was thrown off its path.",
        "Mix the data well, or go on from the last good checkpoint with a lower learning rate.",
        remedy=other_rate(plan, 0.3, GOOD), since=rise.since, before=rise.level, now=vitals.loss.fast,
    )  # fmt: skip


def norm_shift(vitals: Vitals) -> Diagnosis | None:
    """The gradient norm jumped to a new level and stays (CUSUM on its logarithm); alone it is worth a note."""
    rise = vitals.norm_rise
    if rise.total < ALARM or vitals.norm.fast - rise.level < math.log(4):
        return None
    return diagnosis(
        "norm-shift",
        f"Since step {rise.since:,} the corrections are {math.exp(vitals.norm.fast - rise.level):.1f} times as large as before.",
        "The examples may have become harder, or the run is about to tip over.",
        "Nothing needs to be done while the error keeps falling.",
        remedy=None, note=True, since=rise.since, before=math.exp(rise.level), now=math.exp(vitals.norm.fast),
    )  # fmt: skip


ALARM = 16.0


def same_batch(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """Every step seems to read the same examples."""
    if not vitals.sameness.told or vitals.per_epoch < 4 or vitals.loss.fast > 0.9 * vitals.start:
        return None
    return diagnosis(
        "same-batch",
        f"For {vitals.sameness.run} steps the training error has fallen in a perfectly smooth line, from batches of exactly equal size.",
        "Different examples never do that: every step probably reads the same ones, for instance because the data hold one example many times.",
        "Look for repeated rows on the data page and remove them; then read the data fewer times.",
        remedy=fewer_passes(plan, max(0.1, plan.epochs / 4)), steps=vitals.sameness.run,
    )  # fmt: skip


def clip_too_small(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """Nearly every correction is cut down to a small part of itself."""
    limit = plan.dial("max_norm")
    if limit is None or vitals.step < 30 or vitals.clipped < 0.95 * vitals.step or vitals.kept > 0.04:
        return None
    typical = math.exp(vitals.norm.slow)
    return diagnosis(
        "clip-too-small",
        f"{vitals.clipped} of {vitals.step} corrections were cut down, on average to {vitals.kept:.2%} of their size.",
        f"The limit of {limit[1]:g} lies far below the usual size of {typical:.2g}, so the learning rate no longer means what was typed.",
        "Raise the limit.",
        remedy=turned(plan, "max_norm", min(1e4, max(1.0, float(f"{2 * typical:.1g}"))), "a clipping limit"),
        clipped=vitals.clipped, steps=vitals.step, kept=vitals.kept, usual=typical,
    )  # fmt: skip


def too_noisy(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """Chance outweighs what is learned: single steps differ by more than was gained."""
    if vitals.loss.count < 40 or plan.batch * plan.accumulate > 4:
        return None
    restless = vitals.norm.noise > 0.8
    uneven = vitals.loss.noise > 0.5 * abs(vitals.loss.slow) and vitals.loss.slow > 0.5 * vitals.start
    if not (restless and uneven):
        return None
    return diagnosis(
        "too-noisy",
        f"From step to step the error jumps by about {vitals.loss.noise:.2g}, around an average of {vitals.loss.slow:.3g}, and the corrections differ "
        f"by a factor of {math.exp(vitals.norm.noise):.1f}.",
        f"With {plan.behind} behind every correction, chance weighs more than what examples have in common.",
        "Put more examples behind every correction.",
        remedy=larger_batch(plan, 8), noise=vitals.loss.noise, loss=vitals.loss.slow, norm_noise=vitals.norm.noise,
    )  # fmt: skip


# ── an epoch ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def sorted_data(vitals: Vitals) -> Diagnosis | None:
    """The error follows the place in the data: up and down in the same places of every pass, or up at once, down slowly, and again."""
    if vitals.epoch.alike < 1 and vitals.loss_rise.teeth < 2:
        return None
    seen = (
        f"The training error goes up and down in the same places of every pass over the data, by {vitals.epoch.strength:.2g}."
        if vitals.epoch.alike
        else f"{vitals.loss_rise.teeth} times by now the training error has jumped up and come down again, like the teeth of a saw."
    )
    return diagnosis(
        "sorted-data", seen,
        "The examples are probably in an order (by class, length or source), so each stretch teaches only one thing and the next undoes it.",
        "Shuffle the examples before the run.",
        remedy=None, strength=vitals.epoch.strength, teeth=vitals.loss_rise.teeth, passes=vitals.epoch.number,
    )  # fmt: skip


def epoch_jumps(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """The error falls at once when a new pass begins: examples are recognised."""
    if vitals.epoch.drops < 2:
        return None
    held = vitals.held
    gone = held.start is not None and held.last > held.best + held.best_error and held.last > 1.02 * held.best
    return diagnosis(
        "epoch-jumps",
        f"Each time a new pass over the data begins, the training error drops at once (by {vitals.epoch.drop:.0%} the last time), and hardly within a pass.",
        "The model recognises examples that it has seen: it learns them by heart.",
        "While the kept-back examples still get better this is no harm; once they do not, use fewer passes.",
        remedy=fewer_passes(plan, max(1.0, vitals.held.best_epoch)) if gone else None, note=not gone, drop=vitals.epoch.drop, borders=vitals.epoch.drops,
    )  # fmt: skip


# ── a measurement ─────────────────────────────────────────────────────────────────────────────────────────────────────


def idle(share: float, vitals: Vitals) -> Diagnosis | None:
    """Much of what should learn never got a correction."""
    if vitals.held.idle < 2:
        return None
    return diagnosis(
        "idle-parts",
        f"{share:.0%} of the parameters that should learn have not received a single correction in {vitals.step:,} steps.",
        "They are cut off from the error: they start at zero on both sides, are frozen by mistake, or the model does not use them.",
        "What is learned comes from the rest alone. Choose other layers or another method.",
        consequence=True, remedy=None, grave=share > 0.999, course=True, share=share, step=vitals.step,
    )  # fmt: skip


def fading(size: float, vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """The weights that learn shrink towards zero."""
    start = vitals.held.size
    if start is None or vitals.held.fades < 2:
        return None
    decay = plan.dial("weight_decay")
    cause = (
        f"The pull towards zero of {decay[1]:g} is probably far too strong for this learning rate."
        if decay is not None and decay[1] > 0
        else "Something pulls them towards zero, such as a weight decay that is far too strong."
    )
    remedy = turned(plan, "weight_decay", 0.0, "a pull towards zero") if decay is not None and decay[1] > 0 else None
    return diagnosis(
        "weights-fade",
        f"What learns has shrunk to {size / start:.0%} of its size.", cause, "Switch the pull off; what the model knew is being wiped out.",
        remedy=remedy or other_rate(plan, 0.1, BEGINNING), course=True, start=start, now=size,
    )  # fmt: skip


def worse_than_before(vitals: Vitals, plan: Plan, look: Look) -> Diagnosis | None:
    """Kept-back examples are clearly harder than before training, and the training examples are no easier."""
    held = vitals.held
    if held.start is None or held.count < 3 or look.step <= look.warmup_steps or not sound(vitals):
        return None
    up = signals.rises(held.last, held.last_error, held.start, held.start_error, 2.0) and held.last > 1.1 * held.start
    if not up or held.best < held.start * 0.98 or vitals.loss.fast < 0.95 * vitals.start:
        return None
    return diagnosis(
        "rate-too-high",
        f"After {look.step:,} steps the kept-back examples are harder for the model than before training ({held.start:.3g}, now {held.last:.3g}), "
        f"and the training examples are no easier ({vitals.start:.3g}, now {vitals.loss.fast:.3g}).",
        f"The learning rate of {plan.rate:g} is probably far too high.", "Start again with a tenth of it.",
        consequence=True, remedy=other_rate(plan, 0.1, BEGINNING), course=True, start=held.start, now=held.last,
    )  # fmt: skip


def rate_too_low(vitals: Vitals, plan: Plan, look: Look) -> Diagnosis | None:
    """Hardly anything moves: what the rest of the plan would still gain is next to nothing."""
    held, done = vitals.held, look.step / max(1, look.planned_steps)
    if held.start is None or done < 0.25 or look.step <= 1.5 * look.warmup_steps or not sound(vitals):
        return None
    expected = held.farthest / done / abs(held.start)
    gained = vitals.start - vitals.loss.slow
    chance = 3 * max(vitals.loss.fast_error, vitals.loss.noise / math.sqrt(START_COUNT))
    if held.speeding or held.moved > STILL * done or expected > 0.015 or gained > max(0.02 * vitals.start, chance):
        return None
    factor = 100.0 if expected < 5e-4 else 10.0
    return diagnosis(
        "rate-too-low",
        f"After {done:.0%} of the run hardly anything has changed: on kept-back examples the error went from {held.start:.4g} to {held.last:.4g}, "
        f"and at this pace the whole run would change it by {expected:.2%}.",
        f"What learns has hardly moved: the learning rate of {plan.rate:g} is probably far too low, unless the model knows these examples already.",
        f"Start again with {factor:g} times as much.",
        consequence=True, remedy=other_rate(plan, factor, BEGINNING), course=True, start=held.start, now=held.last, expected=expected,
    )  # fmt: skip


START_COUNT = 3
STILL = 4e-4  # what learns has hardly moved when in the whole run its length would change by less than this share


def plateau(vitals: Vitals, plan: Plan, look: Look) -> Diagnosis | None:
    """It moves, and learns nothing."""
    held, done = vitals.held, look.step / max(1, look.planned_steps)
    if held.start is None or held.count < 4 or done < 0.35 or not sound(vitals):
        return None
    gain = held.start - held.best
    trained = vitals.start - vitals.loss.fast
    chance = 3 * max(vitals.loss.fast_error, vitals.loss.noise / math.sqrt(START_COUNT))
    guessing = plan.chance > 0 and held.best > 0.97 * plan.chance and vitals.loss.fast > 0.9 * plan.chance
    if not guessing and (held.speeding or gain > 0.02 * held.start or trained > max(0.04 * vitals.start, chance)):
        return None
    slow = held.moved < 3 * STILL * done
    return diagnosis(
        "plateau",
        f"After {done:.0%} of the run nothing has been learned: the training error is {vitals.loss.fast:.3g} ({vitals.start:.3g} at the start), and on "
        f"kept-back examples it is {held.last:.3g} ({held.start:.3g} at the start).",
        "Either the examples do not say what the answer depends on (wrong labels, empty or equal texts), or the model knows already what they teach, or the "
        f"learning rate is too {'low to get anywhere' if slow else 'high to settle anywhere'}.",
        f"Look at a few examples first; if they are right and new to the model, try {'five times' if slow else 'a fifth of'} the learning rate.",
        consequence=True, remedy=other_rate(plan, 5.0 if slow else 0.2, BEGINNING), start=held.start, best=held.best, now=held.last,
    )  # fmt: skip


def one_answer(times: int, accuracy: float, look: Look) -> Diagnosis | None:
    """It gives the same label to every text; `times` measurements in a row."""
    if times < 3 or look.step < 0.35 * look.planned_steps:
        return None
    return diagnosis(
        "one-answer",
        f"At {times} measurements in a row the model gave one and the same label to every kept-back text ({accuracy:.0%} of them are right by chance).",
        "It has found nothing in the texts that tells the labels apart: they may be empty, alike, or cut before what matters; or one label outweighs the others.",
        "Look at a few examples of each label.",
        consequence=True, remedy=None, measurements=times, accuracy=accuracy,
    )  # fmt: skip


def over_fit(vitals: Vitals, plan: Plan) -> Diagnosis | None:
    """Kept-back examples get harder while training examples get easier."""
    held = vitals.held
    if held.count < 3 or held.last <= held.best or not sound(vitals):
        return None
    then = vitals.start if held.best_fast is None else held.best_fast
    clear = signals.rises(held.last, held.last_error, held.best, held.best_error, 2.0) and held.last > 1.05 * held.best
    steady = held.rises >= 3 and held.last - held.best > max(held.last_error, 0.08 * held.best)
    if not (clear or steady) or vitals.loss.fast > then:
        return None
    return diagnosis(
        "over-fit",
        f"Since step {held.best_step:,} the kept-back examples get harder (error {held.best:.3g}, now {held.last:.3g}) while the training examples "
        f"get easier ({then:.3g}, now {vitals.loss.fast:.3g}).",
        "The model learns its examples by heart.",
        "The best version so far is kept. Use fewer passes, more data, or a method that changes less.",
        consequence=True, remedy=fewer_passes(plan, held.best_epoch), course=True, best=held.best, best_step=held.best_step, now=held.last,
    )  # fmt: skip


def by_heart(vitals: Vitals, plan: Plan, epoch: float) -> Diagnosis | None:
    """Training examples are known far better than kept-back ones, which no longer get better."""
    held = vitals.held
    if held.count < 4 or epoch <= 1.0 or held.start is None or not sound(vitals):
        return None
    gap = held.last - vitals.loss.fast
    error = math.hypot(held.last_error, vitals.loss.fast_error)
    if not (gap > 4 * error and vitals.loss.fast < 0.4 * held.last and held.last > held.best):
        return None
    if held.last < 0.1 * held.start:  # both are as good as solved
        return None
    return diagnosis(
        "by-heart",
        f"The error is {vitals.loss.fast:.3g} on training examples and {held.last:.3g} on kept-back ones, and the latter no longer get better.",
        "The model has begun to learn its examples by heart: they are few, or repeat each other.",
        "Use fewer passes or more data, and look for repeated rows on the data page.",
        consequence=True, remedy=fewer_passes(plan, max(held.best_epoch, 0.5)), train=vitals.loss.fast, held_out=held.last, standard_error=error,
    )  # fmt: skip


def handicapped(vitals: Vitals, plan: Plan, look: Look) -> Diagnosis | None:
    """Training examples are harder than kept-back ones: something disturbs the model while it learns."""
    held = vitals.held
    if held.above < 3 or look.step < 0.35 * look.planned_steps:
        return None
    drop = plan.dial("dropout")
    return diagnosis(
        "train-above-heldout",
        f"The training error ({vitals.loss.fast:.3g}) stays clearly above that on kept-back examples ({held.last:.3g}).",
        "While it learns the model is disturbed more than it can bear (a large share of its parts is dropped at random), or easy examples were kept back.",
        "Lower the dropout, or split the data anew.",
        consequence=True, remedy=turned(plan, "dropout", 0.05, "a dropout") if drop is not None and drop[1] > 0.1 else None,
        train=vitals.loss.fast, held_out=held.last, measurements=held.above,
    )  # fmt: skip


def too_easy(vitals: Vitals, epoch: float) -> Diagnosis | None:
    """Everything is solved almost at once: what is supervised is always the same."""
    held = vitals.held
    if held.start is None or held.count < 2 or epoch > 1.0 or vitals.loss.count < 5:
        return None
    if held.last > 0.02 * held.start or vitals.loss.fast > 0.03 * vitals.start:
        return None
    return diagnosis(
        "too-easy",
        f"After {epoch:.1f} passes over the data the error is next to nothing, on kept-back examples too ({held.start:.3g} at the start, {held.last:.2g} now).",
        "Real answers are never that easy. Probably only a fixed piece of text is learned, such as the mark at the end of each answer, or the answer "
        "stands in the question.",
        "Look at which part of an example is marked as its answer.",
        consequence=True, remedy=None, start=held.start, now=held.last, epoch=epoch,
    )  # fmt: skip


def forgetting(start: Heldout, now: Heldout, vitals: Vitals, plan: Plan, limit: float) -> Diagnosis | None:
    """The shared rule, with the remedy: a smaller rate, or fewer passes when much was forgotten late."""
    found = signals.forgetting(start, now, limit)
    if found is None:
        return None
    return Diagnosis(finding=found, remedy=other_rate(plan, 0.3, BEGINNING))


def sound(vitals: Vitals) -> bool:
    """Whether the loss is one that stands for an error: never below zero, and clearly above it at the start. That of a policy gradient swings around
    zero and says little by its level."""
    return vitals.least >= 0 and vitals.start > 0.05


def single_label(accuracy: float, macro_f1: float, classes: int) -> bool:
    """Whether scores are exactly those of one and the same answer: with accuracy q its macro F1 is 2q / (1 + q) / classes."""
    if classes < 2 or not 0 < accuracy < 1:
        return False
    return abs(macro_f1 - 2 * accuracy / (1 + accuracy) / classes) < 1e-6
