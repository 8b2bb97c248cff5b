"""No method is slow without a reason: wide guards around the ratios that `engine bench efficiency` measures closely."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.bench.backward import saved_bytes
from engine.bench.workbench import Workbench, as_peft, forward, random_llama, step, story_file
from engine.core.method import TrainMethod
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.train.run import Run

COMMON: list[tuple[str, dict[str, Any]]] = [("constant", {}), ("clip", {})]
METHODS = sorted(
    slug
    for slug, method in catalogue().items()
    if issubclass(method, TrainMethod)
    and Slot.PARAMETRIZATION in method.slots
    and (not method.needs.tasks or "causal_lm" in method.needs.tasks)
)


class Lane:
    """A small model of real proportions, and the runs that are timed on it."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.model = f"folder:{random_llama(bench.folder, hidden=192, layers=3, ffn=512, heads=3, vocab=600)}"
        self.data = f"file:{story_file(bench.folder, 60)}"

    def run(self, slug: str, **params: Any) -> Run:
        others = [
            pair
            for pair in COMMON
            if not any(slot.arity == "one" for slot in set(catalogue()[pair[0]].slots) & set(catalogue()[slug].slots))
        ]
        recipe = self.bench.recipe(
            self.model, self.data, [(slug, params), *others], epochs=50, batch_size=4, max_length=128, precision="fp32", holdout=0.05,
        )  # fmt: skip
        return self.bench.run(recipe)

    @functools.cached_property
    def lora(self) -> Run:
        """The baseline."""
        return as_peft(self.run("lora", r=8, targets="all-linear"))


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    bench = Workbench()
    yield Lane(bench)
    bench.close()


def ratio(own: Run, other: Run, rounds: int = 6) -> float:
    """CPU seconds of a step over those of the other run, the quickest of a few interleaved ones."""
    best = {own: float("inf"), other: float("inf")}
    batches = {run: run.next_batches() for run in best}
    for turn in range(rounds + 1):
        for run, micro in batches.items():
            start = time.process_time()
            step(run, micro)
            if turn:  # the first one warms up
                best[run] = min(best[run], time.process_time() - start)
    return best[own] / best[other]


def kept(run: Run) -> int:
    micro = run.next_batches()[0]
    return saved_bytes(lambda: forward(run, micro), run.model)


@pytest.mark.parametrize("slug", METHODS)
def test_a_step_takes_at_most_three_times_that_of_peft_lora(lane: Lane, slug: str) -> None:
    assert (
        ratio(lane.run(slug), lane.lora) < 3.0
    )  # the goal is 1.25; small layers make everything around the products look large


def test_a_ladder_keeps_less_than_half_of_what_lora_keeps_for_backward(lane: Lane) -> None:
    assert kept(lane.run("lst")) <= 0.45 * kept(lane.lora)


def test_our_lora_keeps_no_more_than_that_of_peft(lane: Lane) -> None:
    assert kept(lane.run("lora", r=8, targets="all-linear")) <= kept(lane.lora)


def test_locked_halves_have_no_gradient_no_state_and_a_shorter_step(lane: Lane) -> None:
    half, full = lane.run("hft", outside="frozen"), lane.run("full-finetuning")
    assert ratio(half, full) < 1.1  # the goal is 0.75, where the word tables are large
    learning = {id(parameter) for parameter in half.trainables}
    locked = [parameter for parameter in half.model.parameters() if id(parameter) not in learning]
    assert locked and all(parameter.grad is None and parameter not in half.optimizer.state for parameter in locked)
    assert half.optimizer.state.keys() == set(half.trainables)
