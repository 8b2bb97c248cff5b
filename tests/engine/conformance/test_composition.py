"""The composition law over the whole catalogue: every pair is legal or refused in sentences, and what learns runs in a full house."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from engine.core.method import TrainMethod
from engine.core.recipe import parse_recipe
from engine.core.registry import catalogue
from engine.core.slots import Arity, Slot
from engine.ops.check import check
from engine.ops.folder import run_folder
from tests.engine.tiny import Tiny, lay

METHODS = [method for method in catalogue().values() if issubclass(method, TrainMethod)]
LEARNERS = [method for method in METHODS if Slot.PARAMETRIZATION in method.slots]
SETTINGS = {
    "max_steps": 3,
    "epochs": 2,
    "batch_size": 4,
    "max_length": 48,
    "learning_rate": 1e-2,
    "evaluations": 1,
    "precision": "fp32",
}


def goal_of(*methods: type[TrainMethod]) -> str | None:
    """A goal that all of them allow."""
    for task in ("causal_lm", "classify", "preference", "verifiable", "instruct"):
        if all(not method.needs.tasks or task in method.needs.tasks for method in methods):
            return task
    return None


def body(tiny: Tiny, task: str, *methods: type[TrainMethod]) -> dict[str, Any]:
    refs = [{"slug": method.card.slug, "params": method.presets["tiny"]} for method in methods]
    if not any(Slot.PARAMETRIZATION in method.slots for method in methods):
        refs.insert(0, {"slug": "full-finetuning", "params": {}})
    return {**tiny.inputs(task), "methods": refs, "settings": SETTINGS}


def test_every_pair_is_legal_or_refused_with_the_rule_and_a_way_out(tiny: Tiny) -> None:
    legal = refused = 0
    for one, other in combinations(METHODS, 2):
        task = goal_of(one, other)
        if task is None:
            continue
        faults = check(parse_recipe(body(tiny, task, one, other))).faults
        names = f"{one.card.slug} + {other.card.slug}"
        assert all(fault.what and fault.why and fault.way_out for fault in faults), names
        single = [slot for slot in one.slots if slot in other.slots and slot.arity is Arity.ONE]
        if single:
            taken = [fault for fault in faults if fault.code == "slot_taken"]
            assert taken, names
            assert {fault.why for fault in taken} <= {slot.law for slot in Slot}, names
            assert any(one.card.title in fault.way_out or other.card.title in fault.way_out for fault in taken), names
        legal, refused = legal + (not faults), refused + bool(faults)
    assert legal > 100 and refused > 50, (legal, refused)


@pytest.mark.parametrize("method", LEARNERS, ids=[method.card.slug for method in LEARNERS])
@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_what_learns_runs_with_every_other_slot_filled(
    method: type[TrainMethod], task: str, tiny: Tiny, tmp_path: Path
) -> None:
    """One method in each slot that it leaves free and that no other fills twice: a loss, a rule, an optimizer, a schedule, watchers."""
    if method.needs.tasks and task not in method.needs.tasks:
        assert check(parse_recipe(body(tiny, task, method))).faults
        return
    chosen = [method]
    for other in METHODS:
        free = all(slot.arity is Arity.MANY or all(slot not in held.slots for held in chosen) for slot in other.slots)
        fits = not other.needs.tasks or task in other.needs.tasks
        stands_anyway = other.default and not other.needs.tasks
        candidate = free and fits and not stands_anyway and Slot.PARAMETRIZATION not in other.slots
        if candidate and not check(parse_recipe(body(tiny, task, *chosen, other))).faults:
            chosen.append(other)
    filled = {slot for held in chosen for slot in held.slots}
    assert {Slot.OPTIMIZER, Slot.SCHEDULE, Slot.GRADIENT_RULE, Slot.WATCHER} <= filled
    folder = lay(tmp_path, check(parse_recipe(body(tiny, task, *chosen))).recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", (result["message"], [held.card.slug for held in chosen])
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"], certificate["sentence"]
