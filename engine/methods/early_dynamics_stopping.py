"""Early signals: reads loss and gradient norm of the first part of a run and ends runs that are not worth finishing (arXiv 2412.13337)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any

import torch

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.slots import Slot
from engine.parts import signals
from engine.parts.signals import Finding, Heldout, Step
from engine.train.parts import Look, PartContext, Signal, Watcher


class EarlyDynamics(Watcher):
    """Speaks as a pure function of the looks it was shown: the same stream gives the same verdicts, and each rule speaks once."""

    def __init__(self, params: EarlyDynamicsStopping.Params) -> None:
        self.params = params
        self._steps: list[Step] = []  # until the second window was read
        self._recent: list[Heldout] = []
        self._start: Heldout | None = None
        self._spoken: list[str] = []
        self._seen: tuple[int, int, int] = (0, 0, 0)  # step, samples, tokens of the last row
        self._windows = 0  # how many were read
        self._smooth: float | None = None
        self._early: float | None = None  # loss at the reference step
        self._above = 0  # steps in a row with a runaway loss
        self._first: float | None = None
        self._fell: tuple[float, float] | None = None
        self._judged = False

    def see(self, look: Look) -> Iterator[Signal]:
        """Read a new row, then the evaluation if one came with it. A row that is shown again with its evaluation counts once."""
        findings: list[Finding] = []
        if look.step > self._seen[0] and "loss" in look.row:
            findings += self._read_row(look)
        if look.evaluation is not None:
            findings += self._read_evaluation(look)
        for finding in findings:
            if finding.rule not in self._spoken:
                self._spoken.append(finding.rule)
                yield self._signal(finding)

    def _signal(self, finding: Finding) -> Signal:
        if finding.rule.startswith("window-"):
            return Signal(action="note", rule=finding.rule, message=finding.message, numbers=finding.numbers)
        stop = finding.grave and self.params.may_stop
        aside = (
            " This would have ended the run; it goes on because it may only be watched."
            if finding.grave and not stop
            else ""
        )
        return Signal(
            action="stop" if stop else "warn",
            rule=finding.rule,
            message=finding.message + aside,
            numbers=finding.numbers,
        )

    def _read_row(self, look: Look) -> Iterator[Finding]:
        step = signals.read_step(look.row, look.step, look.samples, self._seen[1:])
        self._seen = (look.step, look.samples, int(look.row.get("tokens") or 0))
        bad = signals.not_finite(step)
        if bad is not None:
            yield bad
            return
        yield from self._runaway(step)
        if self._windows < 2:
            self._steps.append(step)
            self._watch_for_a_fall(look)
            yield from self._windows_that_ended(look)

    def _runaway(self, step: Step) -> Iterator[Finding]:
        p = self.params
        self._smooth = signals.ema(self._smooth, step.loss, p.smoothing)
        if step.step <= p.reference_step:
            self._early = step.loss
            return
        if self._early is None:
            return
        self._above = self._above + 1 if self._smooth > p.runaway_factor * self._early else 0
        finding = signals.runaway(
            self._smooth, self._early, self._above, factor=p.runaway_factor, patience=p.runaway_steps
        )
        if finding is not None:
            yield finding

    def _watch_for_a_fall(self, look: Look) -> None:
        """Remember a collapse of the loss inside the first window; whether it is memorising, the next evaluation tells."""
        p = self.params
        self._first = self._steps[0].loss
        last = self._steps[-p.reference_step :]
        inside = look.samples <= p.first_window * look.planned_samples
        if self._fell is None and inside and len(last) == p.reference_step:
            mean = sum(step.loss * step.weight for step in last) / sum(step.weight for step in last)
            if mean < p.memorising * self._first:
                self._fell = (self._first, mean)

    def _windows_that_ended(self, look: Look) -> Iterator[Finding]:
        p = self.params
        shares = (p.first_window, p.second_window)
        while self._windows < 2 and look.samples >= shares[self._windows] * look.planned_samples:
            share, first = shares[self._windows], self._windows == 0
            self._windows += 1
            seen = signals.window(self._steps, share, look.planned_samples, max(p.drop_steps, look.warmup_steps))
            if seen is None:
                continue  # too short to say anything
            yield Finding(f"window-{self._windows}", False, _describe(seen), seen.numbers())
            found = [signals.always_clipped(seen, p.clipped), signals.unsteady(seen, p.unsteady)]
            if first:
                found.append(signals.norm_climbs(seen, p.norm_rise))
            yield from (finding for finding in found if finding is not None)
        if self._windows == 2:
            self._steps.clear()

    def _read_evaluation(self, look: Look) -> Iterator[Finding]:
        p = self.params
        now = signals.read_heldout(look.evaluation or {}, look.samples)
        if self._start is None:
            self._start = now
            return
        self._recent = [*self._recent, now][-p.worse_times :]
        found = [
            signals.nothing_gained(self._start, self._recent, num_se=p.standard_errors, times=p.worse_times),
            signals.forgetting(self._start, now, p.forgetting),
        ]
        if not self._judged:
            found.append(signals.memorising(self._fell, self._start, now, num_se=p.standard_errors))
            self._judged = look.samples >= p.first_window * look.planned_samples
        yield from (finding for finding in found if finding is not None)

    def state_dict(self) -> dict[str, Any]:
        steps = torch.tensor([astuple(step) for step in self._steps], dtype=torch.float64).reshape(
            -1, len(fields(Step))
        )
        heldout = [self._start, *self._recent] if self._start is not None else []
        return {
            "steps": steps,
            "heldout": torch.tensor([astuple(item) for item in heldout], dtype=torch.float64).reshape(
                -1, len(fields(Heldout))
            ),
            "counters": [*self._seen, self._windows, self._above],
            "spoken": list(self._spoken),
            "losses": [self._smooth, self._early, self._first],
            "fell": list(self._fell) if self._fell else None,
            "judged": self._judged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = [Step(int(row[0]), int(row[1]), *row[2:]) for row in state["steps"].tolist()]
        heldout = [Heldout(int(row[0]), *row[1:]) for row in state["heldout"].tolist()]
        self._start, self._recent = (heldout[0], heldout[1:]) if heldout else (None, [])
        step, samples, tokens, self._windows, self._above = state["counters"]
        self._seen, self._spoken = (step, samples, tokens), list(state["spoken"])
        self._smooth, self._early, self._first = state["losses"]
        self._fell = (state["fell"][0], state["fell"][1]) if state["fell"] else None
        self._judged = state["judged"]


def _describe(seen: signals.Window) -> str:
    said = (
        f"After {seen.share:.0%} of the planned examples: the training error averages {seen.loss:.3g} and is {'falling' if seen.slope < 0 else 'not falling'}, "
        f"and a typical correction has the size {seen.norm:.3g}."
    )
    if seen.noise_batch > 0:
        said += f" Signal and chance weigh the same at about {seen.noise_batch:,.0f} examples at a time."
    return said


class EarlyDynamicsStopping(TrainMethod):
    """Watches the first part of a run for signs that the rest is not worth its time."""

    slots = (Slot.WATCHER,)
    presets = {"tiny": {}, "paper": {}}
    card = Card(
        slug="early-dynamics-stopping",
        title="Early signals",
        pick_when="Pick this when you start several variants of the same training job and want the hopeless ones ended, and the doubtful ones "
        "pointed out, after a small part of the run.",
        summary="It watches two curves that every run draws anyway, the training error and the size of the corrections, and the scores on kept-back "
        "examples. It reads them at 10 % and at 30 % of the planned examples, says in a sentence what it sees, warns of clipping, unsteady "
        "steps, memorising and forgetting, and stops a run that has exploded or gains nothing. It changes nothing in the run itself. The "
        "paper found the signals across runs; the rules and limits inside one run are ours and every one of them is a dial.",
        paper="Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs",
        year=2024,
        arxiv="2412.13337",
        family="Watchers",
        algorithm=(
            "Take the token-weighted loss and the L2 norm of the gradient over all trainables, before clipping, of every step.",
            "Window one is the first 10 % of the planned samples, window two the first 30 %; the first 5 steps, or the warm-up if it is longer, are left out.",
            "In each window: median norm, its spread (interquartile range / median), mean loss, slope of the loss against log(samples), share of clipped "
            "steps; and, when a step reports the norm of one micro-batch, the squared norm freed of batch noise G2 = (B|g_B|^2 - b|g_b|^2)/(B - b), "
            "the noise S = (|g_b|^2 - |g_B|^2)/(1/b - 1/B), and the batch size S/G2 at which both are equal.",
            "Stop at once when loss or norm is not finite, or when the loss, smoothed over 20 steps, stays above 1.5 times the loss of step 5 for 50 steps.",
            "Stop when, two measurements in a row, the held-out loss is above its start by more than 2 standard errors and the general loss is worse too. "
            "Without a general loss this is a warning.",
            "Warn when over 80 % of the steps are clipped, when the spread of the norm exceeds 1.5, when the norm more than doubles over window one while the "
            "loss falls, when the loss drops below 0.3 of its start inside window one while held-out loss is flat, and when general loss rises by over 5 %.",
            "A low or a high norm alone never stops a run. Each rule speaks once.",
        ),
        avoid_when="Your runs are shorter than about a hundred steps: the windows then hold too few steps to say anything. It compares a run with itself, "
        "not with its neighbours.",
        traps=(
            "Raw norm and loss depend on batch size and learning rate; compare runs by the noise-corrected norm, and only within one kind of run.",
            "The paper measures kept general ability; when only the new task counts, a higher early loss is not better.",
            "The evidence is full fine-tuning at 3B to 7B. For adapters and encoders the rules run, but no paper backs the limits.",
            "With LoRA the norm starts near zero because B is zero; the first steps are left out for that reason.",
        ),
        figures=(
            Figure(
                claim="Across runs, a lower early gradient norm and a higher early loss went with better final benchmarks",
                paper="found by the authors; no threshold or correlation published",
            ),
            Figure(claim="MTBench, batch 128 against a large batch", paper="6.41 → 6.83 (unconfirmed)"),
            Figure(claim="MTBench, stacked against phased data", paper="6.77 against 6.76 (quoted by a reviewer)"),
        ),
        cost=Cost(time=1, memory=1, size=1),
    )

    class Params(HyperParams):
        """Limits of the rules; the defaults are our design, the paper prints none."""

        may_stop: bool = dial(
            True,
            label="May end the run",
            tier="basic",
            help="Ends a hopeless run and keeps what it learned; otherwise it only says that it would have.",
        )
        first_window: float = dial(
            0.10,
            label="First look",
            unit="share",
            low=0.01,
            high=0.5,
            help="The first look covers this share of all examples the run will read.",
        )
        second_window: float = dial(
            0.30,
            label="Second look",
            unit="share",
            low=0.02,
            high=1.0,
            help="The second look covers this share of all examples the run will read.",
        )
        drop_steps: int = dial(
            5,
            label="Steps left out",
            unit="steps",
            low=0,
            high=10_000,
            help="So many first steps are not judged, or the warm-up if that is longer.",
        )
        smoothing: int = dial(
            20,
            label="Smoothing",
            unit="steps",
            low=1,
            high=10_000,
            help="The training error is averaged over about this many steps before it is called a runaway.",
        )
        reference_step: int = dial(
            5,
            label="Early step",
            unit="steps",
            low=1,
            high=10_000,
            help="The error at this step is what a runaway is measured against.",
        )
        runaway_factor: float = dial(
            1.5,
            label="Runaway",
            unit="times",
            low=1.0,
            high=100.0,
            help="The run has run away when its error stays above the early error times this.",
        )
        runaway_steps: int = dial(
            50,
            label="Runaway for",
            unit="steps",
            low=1,
            high=100_000,
            help="So many steps in a row it must stay there.",
        )
        standard_errors: float = dial(
            2.0,
            label="Certainty",
            unit="standard errors",
            low=0.0,
            high=10.0,
            help="A change on kept-back examples counts when it is larger than this many times its own uncertainty.",
        )
        worse_times: int = dial(
            2,
            label="Worse in a row",
            unit="measurements",
            low=1,
            high=100,
            help="So many measurements in a row must be worse than the start before the run counts as gaining nothing.",
        )
        clipped: float = dial(
            0.8,
            label="Clipped steps",
            unit="share",
            low=0.0,
            high=1.0,
            help="Warns when more than this share of the corrections had to be cut down.",
        )
        unsteady: float = dial(
            1.5,
            label="Unsteadiness",
            unit="1",
            low=0.0,
            high=100.0,
            help="Warns when the spread of the corrections' sizes is more than this many times the middle size.",
        )
        norm_rise: float = dial(
            2.0,
            label="Growing corrections",
            unit="times",
            low=1.0,
            high=100.0,
            help="Warns when corrections grow by more than this within the first look although the error falls.",
        )
        memorising: float = dial(
            0.3,
            label="Sudden fall",
            unit="share",
            low=0.0,
            high=1.0,
            help="Warns when the training error falls below this share of its start within the first look, and kept-back examples do not "
            "become easier.",
        )
        forgetting: float = dial(
            0.05,
            label="Forgetting",
            unit="share",
            low=0.0,
            high=10.0,
            help="Warns when the error on general text rises by more than this share.",
        )

    @classmethod
    def check(cls, params: Params, facts: Facts) -> list[Fault]:
        if params.first_window < params.second_window:
            return []
        return [
            Fault(
                where="second_window",
                what=f"The second look ends at {params.second_window:.0%} and the first at {params.first_window:.0%}.",
                why="The second look contains the first.",
                way_out=f"Choose more than {params.first_window:g}.",
                code="windows_crossed",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Watcher]:
        return [EarlyDynamics(self.params)]
