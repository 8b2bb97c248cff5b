"""Forks: another run goes on from a saved state. Unchanged it is the same run bit for bit; changed, only what comes after differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.core.control import Control, clear_requests, write_request
from engine.core.errors import EngineError
from engine.core.events import LOG_NAME, EventLog, read_events
from engine.core.fork import ORIGIN, begin_log, checkpoint_steps, differing, fork_faults, fork_of, lay_fork
from engine.core.recipe import Recipe, parse_recipe
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.ops.train import announce, prepare
from engine.train import checkpoint
from engine.train.loop import train
from tests.engine.tiny import Tiny, events, lay, metric_rows

STEPS, LEFT = 12, 6


def recipe(tiny: Tiny, dropout: float = 0.1, **settings: Any) -> Recipe:
    body = {
        **tiny.inputs("causal_lm"),
        "methods": [{"slug": "lora", "params": {"r": 2, "dropout": dropout}}, {"slug": "adamw"}, {"slug": "constant", "params": {"warmup": 0.0}}],
        "settings": {"max_steps": STEPS, "epochs": 50, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2, "evaluations": 2,
                     "checkpoint_every": 2, "keep_checkpoints": 50, **settings},
    }  # fmt: skip
    return require(parse_recipe(body)).recipe


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its beginning to its end."""
    return lay(tmp_path_factory.mktemp("whole"), recipe(tiny))


@pytest.fixture(scope="module", autouse=True)
def ran(whole: Path) -> None:
    assert trained(whole) == "completed"


def trained(folder: Path) -> str:
    """Everything that a job does but the export; says how the loop ended."""
    begin_log(folder)
    log = EventLog(folder)
    try:
        run = prepare(
            require(parse_recipe(json.loads((folder / "recipe.json").read_text()))), folder, log, Control(folder)
        )
        announce(run)
        return train(run).reason
    finally:
        log.close()


def fork(whole: Path, folder: Path, after: Recipe, step: int = LEFT) -> Path:
    lay_fork(whole, step, folder, name="whole", recipe=json.loads((whole / "recipe.json").read_text()))
    return lay(folder, after)


def series(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metric_rows(folder)]


def last(folder: Path) -> checkpoint.Snapshot:
    return checkpoint.load(checkpoint.listed(folder)[-1])


def same(one: checkpoint.Snapshot, other: checkpoint.Snapshot) -> bool:
    return one.step == other.step and all(
        mine.keys() == theirs.keys() and all(bool((mine[name] == theirs[name]).all()) for name in mine)
        for mine, theirs in ((one.trainables, other.trainables), (one.optimizer, other.optimizer))
    )


def test_an_unchanged_fork_is_the_same_run_bit_for_bit(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    assert trained(fork(whole, tmp_path, recipe(tiny))) == "completed"
    assert series(tmp_path) == series(whole) and same(last(tmp_path), last(whole))
    numbers = [event.seq for event, _ in read_events(tmp_path / LOG_NAME)]
    assert numbers == list(range(1, len(numbers) + 1)), "dense, with the curve of the other run in front"
    assert not (tmp_path / ORIGIN).exists()


def test_the_other_run_may_be_deleted_before_the_fork_starts(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "gone")
    mine = fork(tmp_path / "gone", tmp_path / "fork", recipe(tiny))
    shutil.rmtree(tmp_path / "gone")
    assert run_folder(mine)["outcome"] == "succeeded" and same(last(mine), last(whole))


def test_a_changed_rate_changes_what_comes_after_and_nothing_before(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    assert trained(fork(whole, tmp_path, recipe(tiny, learning_rate=1e-3))) == "completed"
    mine, theirs = series(tmp_path), series(whole)
    assert mine[: LEFT + 1] == theirs[: LEFT + 1], "the step after the fork still sees the old weights"
    assert mine[LEFT + 1 :] != theirs[LEFT + 1 :]
    said = [line["message"] for line in events(tmp_path, "log")]
    assert "Goes on from step 6 of “whole”: learning_rate is 0.001 instead of 0.01." in said


def test_a_finished_run_goes_on_as_if_it_had_been_planned_longer(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    longer = recipe(tiny, max_steps=20)
    at_once = lay(tmp_path / "at-once", longer)
    assert trained(at_once) == "completed"
    assert trained(fork(whole, tmp_path / "fork", longer, STEPS)) == "completed"
    assert series(tmp_path / "fork") == series(at_once) and same(last(tmp_path / "fork"), last(at_once))


def test_a_fork_that_was_interrupted_goes_on_by_its_own_checkpoints(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    after = recipe(tiny, learning_rate=1e-3)
    once, twice = fork(whole, tmp_path / "once", after), fork(whole, tmp_path / "twice", after)
    assert trained(once) == "completed"
    write_request(twice, "pause")
    assert trained(twice) == "paused"
    clear_requests(twice)
    assert trained(twice) == "completed"
    assert series(twice) == series(once) and same(last(twice), last(once))


def test_what_was_built_with_a_value_cannot_change(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    result = run_folder(fork(whole, tmp_path, recipe(tiny, batch_size=2)))
    assert (result["outcome"], result["reason"]) == ("failed", "bad_input")
    assert "'settings.batch_size' cannot change in the middle of a run." in result["message"]


def test_faults_name_each_change_that_a_run_does_not_survive(tiny: Tiny) -> None:
    before = recipe(tiny)
    after = recipe(tiny, dropout=0.2, max_length=32, learning_rate=1e-3, max_steps=30)
    assert set(differing(before, after)) == {
        "lora.dropout",
        "settings.max_length",
        "settings.learning_rate",
        "settings.max_steps",
    }
    live = {"lora.dropout", "settings.learning_rate"}
    assert [fault.where for fault in fork_faults(before, after, live.__contains__)] == ["settings.max_length"]
    assert fork_faults(before, before, live.__contains__) == []


def test_a_state_that_is_gone_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="There is no saved state at step 7"):
        lay_fork(whole, 7, tmp_path / "fork", name="whole", recipe={})


def test_states_are_kept_as_the_recipe_says(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    assert checkpoint_steps(whole) == [0, 2, 4, 6, 8, 10, 12]
    few = lay(tmp_path, recipe(tiny, keep_checkpoints=1))
    assert trained(few) == "completed"
    best = last(few).values["best"]["step"]
    assert set(checkpoint_steps(few)) == {best, 12} and fork_of(few) is None
