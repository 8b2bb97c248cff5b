"""Patience: ends a run when the kept-back examples stop improving. The oldest early stopping there is, and the one to beat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.slots import Slot
from engine.train.parts import Look, PartContext, Signal, Watcher

Measure = Literal["eval_loss", "eval_perplexity", "eval_accuracy", "eval_macro_f1"]
_HIGHER_IS_BETTER = {"eval_accuracy", "eval_macro_f1"}


class PatienceWatcher(Watcher):
    """Counts measurements in a row without an improvement of at least `min_delta`."""

    def __init__(self, params: Patience.Params) -> None:
        self.params = params
        self._best: float | None = None
        self._best_step = 0
        self._waited = 0
        self._last_step = -1
        self._missed = False
        self._stopped = False

    def see(self, look: Look) -> Iterator[Signal]:
        if look.evaluation is None or look.step <= self._last_step:
            return
        self._last_step = look.step
        name = self.params.measure
        if name not in look.evaluation:
            if not self._missed:
                self._missed = True
                yield Signal(
                    action="warn",
                    rule="not-measured",
                    numbers={"measure": name},
                    message=f"The measure '{_words(name)}' is not measured in this run, so patience cannot watch it.",
                )
            return
        score = look.evaluation[name]
        value = float(score) if isinstance(score, int | float) else math.nan
        if self._improves(value):
            self._best, self._best_step, self._waited = value, look.step, 0
            return
        self._waited += 1
        if self._waited >= self.params.patience and not self._stopped:
            self._stopped = True
            yield Signal(
                action="stop",
                rule="no-improvement",
                message=self._sentence(),
                numbers={
                    "measure": name,
                    "best": self._best,
                    "best_step": self._best_step,
                    "now": value if math.isfinite(value) else None,
                    "measurements": self._waited,
                    "min_delta": self.params.min_delta,
                },
            )

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        gain = value - self._best if self.params.measure in _HIGHER_IS_BETTER else self._best - value
        return gain > 0 and gain >= self.params.min_delta

    def _sentence(self) -> str:
        times = f"{self._waited} measurements in a row" if self._waited > 1 else "the last measurement"
        if self._best is None:
            return f"The {_words(self.params.measure)} was not a number in {times}; going on would only waste time."
        return (
            f"The {_words(self.params.measure)} on kept-back examples has not become better in {times}; "
            f"the best was {self._best:.4g} at step {self._best_step:,}. Going on would mostly memorise."
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self._best,
            "counters": [self._best_step, self._waited, self._last_step],
            "said": [self._missed, self._stopped],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = state["best"]
        self._best_step, self._waited, self._last_step = state["counters"]
        self._missed, self._stopped = state["said"]


def _words(measure: str) -> str:
    return {"eval_loss": "error", "eval_macro_f1": "balanced accuracy (macro F1)"}.get(
        measure, measure.removeprefix("eval_")
    )


class Patience(TrainMethod):
    """Stops when the kept-back examples stop improving."""

    slots = (Slot.WATCHER,)
    presets = {"tiny": {"patience": 1}, "paper": {}}
    card = Card(
        slug="patience",
        title="Stop when it no longer improves",
        pick_when="Pick this when you do not know how long to train and want the run to end by itself once it stops getting better.",
        summary="Every time the kept-back examples are scored, it checks whether the score is better than the best so far. After a few measurements "
        "without progress it ends the run; the best version is what you take home. It changes nothing in the run itself.",
        family="Watchers",
        algorithm=(
            "After every measurement, compare the chosen score with the best so far.",
            "An improvement smaller than the least step, and a score that is not a number, count as none.",
            "After so many measurements in a row without an improvement, stop; everything learned is kept and the best version is exported.",
        ),
        avoid_when="The score is measured on very few examples, so that chance decides; or the learning rate falls late in the run, which often "
        "brings the last improvement after a long flat stretch.",
        traps=(
            "Measurements are counted, not steps: with few measurements per run, patience reacts late.",
            "Choosing the best of many measurements makes the reported score slightly too good.",
        ),
        cost=Cost(time=1, memory=1, size=1),
    )

    class Params(HyperParams):
        """How long to wait, and for what."""

        patience: int = dial(
            3,
            label="Patience",
            unit="measurements",
            low=1,
            high=1000,
            tier="basic",
            help="How many measurements in a row may pass without progress before the run ends.",
        )
        measure: Measure = dial(
            "eval_loss",
            label="Score to watch",
            help="The error reacts soonest and suits every goal; accuracy is what people ask for in the end.",
        )
        min_delta: float = dial(
            0.0,
            label="Least step",
            unit="1",
            low=0.0,
            high=1000.0,
            help="An improvement smaller than this does not count.",
        )

    @classmethod
    def check(cls, params: Params, facts: Facts) -> list[Fault]:
        classes = params.measure in _HIGHER_IS_BETTER
        if params.measure == "eval_loss" or classes == (facts.task == "classify"):
            return []
        return [
            Fault(
                where="measure",
                what=f"The goal {facts.task} does not measure the {_words(params.measure)}.",
                why="That score is for sorting into classes."
                if classes
                else "That score is for models that write text.",
                way_out="Choose eval_loss, which every goal measures.",
                code="not_measured",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Watcher]:
        return [PatienceWatcher(self.params)]
