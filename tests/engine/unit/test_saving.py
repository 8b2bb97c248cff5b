"""Checkpoints written beside the training: what is saved is the step border, whatever happens while the disk works."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.train.saving as saving
from engine.core.control import Control, write_request
from engine.core.events import EventLog
from engine.core.recipe import Recipe, parse_recipe
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.ops.train import prepare
from engine.ops.train import run as train
from engine.train import checkpoint
from engine.train.checkpoint import Draft, Snapshot
from engine.train.run import Run
from engine.train.saving import CheckpointWriter
from tests.engine.interrupted import assert_same_run
from tests.engine.tiny import Tiny, events, lay, metric_rows

METHODS: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {}), ("clip", {}), ("patience", {"patience": 50})]


class SlowDisk:
    """`checkpoint.save` that waits for leave before it writes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.leave = threading.Event()
        self.inside = self.most = 0
        self._save = checkpoint.save
        patch.setattr(checkpoint, "save", self)

    def __call__(self, folder: Path, draft: Draft) -> Path:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.leave.wait(60)
        path = self._save(folder, draft)
        self.inside -= 1
        return path


def ready(tiny: Tiny, folder: Path) -> Run:
    """A run that has made its first step."""
    recipe = tiny.recipe(METHODS)
    lay(folder, recipe)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    run.model.train()
    run.begin()
    advance(run)
    return run


def advance(run: Run) -> None:
    report = run.update_rule.update(run, run.next_batches())
    run.clock.step, run.clock.samples, run.clock.tokens = report.step, report.samples, report.tokens
    run.adapt(report)
    run.look(run.record(report))


def no_room(patch: pytest.MonkeyPatch) -> None:
    """Let no memory be left for a copy, so that the run itself writes."""
    patch.setattr(saving, "free_memory", lambda: 0)


def assert_same_snapshot(mine: Snapshot, theirs: Snapshot) -> None:
    clock = {key: value for key, value in mine.values["clock"].items() if key != "seconds"}
    assert clock == {key: value for key, value in theirs.values["clock"].items() if key != "seconds"}
    for saved, expected in (
        (mine.trainables, theirs.trainables),
        (mine.optimizer, theirs.optimizer),
        (mine.tensors, theirs.tensors),
    ):
        assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    assert mine.values["rng"] == theirs.values["rng"] and mine.values["parts"] == theirs.values["parts"]


def test_what_is_written_is_the_step_border_though_the_run_has_gone_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_room(patch)
        plain = ready(tiny, tmp_path / "plain")
        plain.save()
        assert checkpoint.listed(plain.folder), "without room for a copy it is on the disk at once"
    expected = checkpoint.load(checkpoint.listed(plain.folder)[-1])

    run = ready(tiny, tmp_path / "copied")
    disk = SlowDisk(monkeypatch)
    run.save()
    for _ in range(3):
        advance(run)
        run.collect()
    assert not checkpoint.listed(run.folder) and not events(run.folder, "checkpoint"), (
        "nothing is told before it is true"
    )
    disk.leave.set()
    run.saving.wait()
    assert [event["step"] for event in events(run.folder, "checkpoint")] == [1]
    assert_same_snapshot(checkpoint.load(checkpoint.listed(run.folder)[-1]), expected)
    assert not torch.equal(next(iter(run.trainables)), expected.trainables[run.trainables.items()[0][0]])


def test_one_checkpoint_at_a_time_and_the_memory_is_used_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready(tiny, tmp_path)
    run.save()
    run.saving.wait()
    first = {place: buffer.data_ptr() for place, buffer in run.saving._copies.items()}
    disk = SlowDisk(monkeypatch)
    advance(run)
    run.save()
    advance(run)
    helper = threading.Timer(0.2, disk.leave.set)
    helper.start()
    run.save()
    assert disk.leave.is_set(), "the next one waited for the one before"
    run.saving.wait()
    assert disk.most == 1 and [path.name for path in checkpoint.listed(tmp_path)] == ["step-00000002", "step-00000003"]
    assert {place: buffer.data_ptr() for place, buffer in run.saving._copies.items()} == first


def test_a_slow_disk_changes_no_number_and_the_end_waits_for_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(METHODS, checkpoint_every=2)
    with monkeypatch.context() as patch:
        no_room(patch)
        plain = lay(tmp_path / "plain", recipe)
        assert run_folder(plain)["outcome"] == "succeeded"
    save = checkpoint.save

    def slowly(folder: Path, draft: Draft) -> Path:
        time.sleep(0.1)
        return save(folder, draft)

    monkeypatch.setattr(checkpoint, "save", slowly)
    folder = lay(tmp_path / "slow", recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    assert_same_run(folder, plain)
    told = [[(e["step"], e["path"], e["best"]) for e in events(f, "checkpoint")] for f in (folder, plain)]
    assert told[0] == told[1] and checkpoint.listed(folder)[-1].name == "step-00000008"


@pytest.mark.parametrize("request_", ["pause", "cancel"])
def test_a_run_that_is_left_leaves_a_checkpoint_of_its_last_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: Any
) -> None:
    save = checkpoint.save

    def slowly(folder: Path, draft: Draft) -> Path:
        time.sleep(0.2)
        return save(folder, draft)

    monkeypatch.setattr(checkpoint, "save", slowly)
    folder = lay(tmp_path, tiny.recipe(METHODS))
    write_request(folder, request_)
    assert run_folder(folder)["outcome"] == {"pause": "paused", "cancel": "cancelled"}[request_]
    assert checkpoint.listed(folder)[-1].name == "step-00000001"
    assert not list((folder / checkpoint.FOLDER).glob(".*")) and not threading.current_thread().name.startswith("check")


def test_the_log_is_on_the_disk_before_a_checkpoint_has_its_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready(tiny, tmp_path)
    synced: list[bytes] = []
    settle, rename = EventLog.settle, Path.rename

    def settled(log: EventLog) -> None:
        settle(log)
        synced.append(log.path.read_bytes())

    named: list[bytes] = []

    def renamed(path: Path, target: Any) -> Path:
        if path.suffix == ".tmp" and path.name.startswith(".step-"):
            named.append(synced[-1])
        return rename(path, target)

    monkeypatch.setattr(EventLog, "settle", settled)
    monkeypatch.setattr(Path, "rename", renamed)
    run.save()
    run.saving.wait()
    assert len(named) == 1 and b'"kind":"metric"' in named[0], "the row of the step stood there"


def test_a_full_disk_is_told_as_it_was_and_the_checkpoint_before_resumes_to_the_same_bits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(METHODS, max_steps=60, epochs=50, checkpoint_every=3, evaluations=1)
    whole, folder = lay(tmp_path / "whole", recipe), lay(tmp_path / "full", recipe)
    assert run_folder(whole)["outcome"] == "succeeded"
    fsync, failed_at = os.fsync, []

    def full(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if ".step-00000006." in name and "optimizer" in name:
            failed_at.append(time.monotonic())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run_folder(folder)
    assert failed_at and (result["outcome"], result["reason"]) == ("failed", "environment")
    assert "No space left on device" in result["message"] and "the last checkpoint is kept" in result["message"]
    assert metric_rows(folder)[-1]["step"] <= 9, "the next checkpoint would have waited for it"
    assert [path.name for path in checkpoint.listed(folder)] == ["step-00000000", "step-00000003"]
    assert not list((folder / checkpoint.FOLDER).glob(".*")), "half a checkpoint does not fill the disk"
    assert run_folder(folder)["outcome"] == "succeeded"
    assert_same_run(folder, whole)


def test_a_failure_is_raised_at_the_next_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(tiny, tmp_path)

    def broken(folder: Path, draft: Draft) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "save", broken)
    run.save()
    assert run.saving._thread is not None
    run.saving._thread.join()
    with pytest.raises(OSError, match="Input/output error"):
        run.collect()
    assert not events(run.folder, "checkpoint")


def test_what_went_wrong_first_is_what_is_told(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(tiny, tmp_path)

    def broken(folder: Path, draft: Draft) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ZeroDivisionError) as caught, run.saving.finishing():
        run.save()
        raise ZeroDivisionError
    assert "Input/output error" in caught.value.__notes__[0]


def test_what_grows_or_goes_is_copied_whole(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, EventLog(tmp_path))
    pieces = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)},
        {"a": torch.arange(12.0).reshape(3, 4).t(), "c": torch.tensor(7.0), "d": torch.zeros(0)},
        {"a": torch.arange(12, dtype=torch.int64).reshape(4, 3), "b": torch.ones(4, dtype=torch.bool)},
    ]
    for step, tensors in enumerate(pieces, start=1):
        writer.put(Snapshot(step=step, trainables=tensors, values={"list": [step]}), step)
        writer.wait()
        found = checkpoint.load(checkpoint.listed(tmp_path)[-1])
        assert found.step == step and found.values == {"list": [step]} and found.trainables.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.trainables[name].dtype == tensor.dtype and torch.equal(found.trainables[name], tensor)
        assert {name for _, name in writer._copies} == tensors.keys()


def test_values_are_those_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    writer = CheckpointWriter(tmp_path, EventLog(tmp_path))
    values = {"history": [1, 2]}
    writer.put(Snapshot(step=1, trainables={}, values=values), None)
    values["history"].append(3)
    disk.leave.set()
    writer.wait()
    assert checkpoint.load(checkpoint.listed(tmp_path)[-1]).values == {"history": [1, 2]}


def test_the_run_waits_much_less_than_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The aim is a tenth; here a third of that is enough, since other work may be going on."""
    state = {f"w{n}": torch.randn(1_000_000) for n in range(24)}  # 96 MB
    writer = CheckpointWriter(tmp_path, EventLog(tmp_path))
    stalls: dict[str, list[float]] = {"copied": [], "at once": []}

    def put(kind: str, step: int) -> None:
        start = time.perf_counter()
        writer.put(Snapshot(step=step, trainables=state), None)
        stalls[kind].append(time.perf_counter() - start)

    for step in range(0, 12, 2):
        put("copied", step)
        writer.wait()
        kept = writer._copies
        with monkeypatch.context() as patch:
            no_room(patch)
            writer._copies = {}
            put("at once", step + 1)
        writer._copies = kept
    ratios = [slow / quick for quick, slow in zip(stalls["copied"][1:], stalls["at once"][1:], strict=True)]
    assert statistics.median(ratios) >= 10 / 3, ratios


def _child(folder: Path) -> None:
    """Train or go on, and write the result; its certificate is not what is asked here."""
    torch.set_num_threads(1)
    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text()))
    log = EventLog(folder)
    train(require(recipe), folder, log, Control(folder), nested=True)
    log.close()


def _half_written(folder: Path) -> bool:
    return any((folder / checkpoint.FOLDER).glob(".step-*.tmp"))


def _killed(folder: Path, moment: Callable[[], bool], context: Any) -> bool:
    """Run the job in a process of its own and kill it at the moment; False when it had ended before."""
    child = context.Process(target=_child, args=(folder,))
    child.start()
    while child.is_alive() and not moment():
        time.sleep(0.0005)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return bool(child.exitcode == -signal.SIGKILL)


def _drill(recipe: Recipe, folder: Path, dice: random.Random, context: Any, most: int) -> tuple[int, int]:
    """Kill at most `most` times, every other time while a checkpoint is half written, then let it end: (kills, those beside a half one)."""
    lay(folder, recipe)
    kills = halves = 0
    for turn in range(most):
        begun = time.monotonic()
        delay = dice.uniform(0.3, 1.0)
        rest = dice.uniform(0.0, 0.02)

        def moment(turn: int = turn, begun: float = begun, delay: float = delay, rest: float = rest) -> bool:
            if time.monotonic() - begun < delay:
                return False
            if turn % 2:
                return True
            if _half_written(folder):
                time.sleep(rest)
                return True
            return False

        if not _killed(folder, moment, context):
            break
        kills, halves = kills + 1, halves + _half_written(folder)
    child = context.Process(target=_child, args=(folder,))
    child.start()
    child.join()
    return kills, halves


@pytest.mark.slow
def test_kill_9_beside_a_half_written_checkpoint_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(METHODS, max_steps=160, epochs=200, checkpoint_every=4, evaluations=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.warmed"])
    whole = tmp_path / "whole"
    assert _drill(recipe, whole, random.Random(0), context, 0) == (0, 0) and (whole / "artifact").exists()
    dice = random.Random(20262)
    kills = halves = 0
    for number in range(3):
        folder = tmp_path / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        more, beside = _drill(recipe, folder, dice, context, 6)
        kills, halves = kills + more, halves + beside
        assert_same_run(folder, whole)
        assert not _half_written(folder) and len(checkpoint.listed(folder)) in (2, 3)
    assert kills >= 4 and halves >= 1, "how many there are depends on how quick the machine is"
