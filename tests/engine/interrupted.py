"""Runs that are stopped at a chosen step, or whose best evaluation comes at a chosen step, for tests of resume and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.control import write_request
from engine.core.recipe import Recipe
from engine.ops.folder import run_folder
from engine.train import checkpoint
from engine.train.run import Run
from tests.engine.tiny import lay, metric_rows


def best_comes_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let every evaluation be judged by its distance from `step`, so that the checkpoint of that step is the best one."""
    measure = Run.evaluate

    def scored(run: Run) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as inner:
            held = run.task.evaluate
            far = float(abs(run.clock.step - step))
            inner.setattr(type(run.task), "goodness", lambda task, scores: (-scores["distance"],))
            inner.setattr(run.task, "evaluate", lambda *given: {**held(*given), "distance": far})
            return measure(run)

    patch.setattr(Run, "evaluate", scored)


def run_and_pause_behind(step: int, folder: Path, recipe: Recipe) -> None:
    """Run until a checkpoint of `step` is made and the loop has seen the request: one step later at the most."""
    lay(folder, recipe)
    save = Run.save

    def save_and_ask(run: Run) -> None:
        save(run)
        if run.clock.step == step:
            write_request(run.folder, "pause")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save_and_ask)
        assert run_folder(folder)["outcome"] == "paused"
    (folder / "control.json").unlink()


def assert_same_run(one: Path, other: Path) -> None:
    """Every logged number, every trainable and all optimizer state agree to the last bit."""
    assert metric_rows(one) == metric_rows(other)
    mine, theirs = (checkpoint.load(checkpoint.listed(folder)[-1]) for folder in (one, other))
    for saved, expected in ((mine.trainables, theirs.trainables), (mine.optimizer, theirs.optimizer)):
        assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    assert mine.values["born"] == theirs.values["born"] and mine.values["names"] == theirs.values["names"]
