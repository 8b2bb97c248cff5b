"""The disk is full at every single write, sync and rename: the old state or the new one stands there, and the run goes on to the same bits."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.control import write_json
from engine.core.events import EventLog, read_events
from engine.core.recipe import Recipe
from engine.ops.folder import RESULT, exit_code, run_folder
from engine.train import checkpoint
from engine.train.checkpoint import Snapshot
from engine.train.saving import CheckpointWriter
from tests.drills import drill, often
from tests.engine.full_disk import FullDisk
from tests.engine.interrupted import assert_same_run
from tests.engine.tiny import Tiny, events, lay, metric_rows

PLACE = "tests/engine/unit/test_drill_disk.py"
METHODS: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {}), ("clip", {}), ("patience", {"patience": 50})]


def snapshot(step: int) -> Snapshot:
    """A state that names its step in every piece, so that a mixture would show."""
    return Snapshot(
        step=step,
        trainables={name: torch.full((3, 5), float(step)) for name in "ab"},
        optimizer={"a/m": torch.full((3, 5), step + 0.5)},
        tensors={"order": torch.tensor([step])},
        values={"step": step},
    )


def is_whole(found: Snapshot) -> bool:
    expected = snapshot(found.step)
    return found.values == expected.values and all(
        got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        for got, want in (
            (found.trainables, expected.trainables),
            (found.optimizer, expected.optimizer),
            (found.tensors, expected.tensors),
        )
    )


def folder_with(tmp_path: Path, *steps: int) -> Path:
    folder = tmp_path / "job"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for step in steps:
        checkpoint.save(folder, snapshot(step).draft())
    return folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, number: int) -> None:
    """Every call that one checkpoint makes fails once, alone and with all that follow it; a new step, and the same step again."""
    with drill(
        "fail at every write: a checkpoint",
        f"the k-th write, fsync, rename or new file of a checkpoint fails with {errno.errorcode[number]}, for every k, alone and with all that follow",
        unit="failures",
        place=PLACE,
    ) as told:
        for new in (4, 3):
            for once in (True, False):
                at, failed = 0, True
                while failed:
                    at += 1
                    folder = folder_with(tmp_path, 2, 3)
                    with pytest.MonkeyPatch.context() as patch:
                        disk = FullDisk(patch, folder, at=at, once=once, number=number)
                        try:
                            checkpoint.save(folder, snapshot(new).draft())
                        except OSError as error:
                            assert error.errno == number
                        failed = disk.failed
                    told.times += failed
                    found, complaints = checkpoint.newest(folder)
                    assert found is not None and found.step in (3, new) and is_whole(found) and not complaints, (
                        disk.calls[-1]
                    )
                    assert all(is_whole(checkpoint.load(path)) for path in checkpoint.listed(folder))
                    assert [path.name for path in checkpoint.listed(folder)][:2] == ["step-00000002", "step-00000003"]
                    left = list((folder / checkpoint.FOLDER).glob(".*"))
                    assert not left, f"half a checkpoint does not fill the disk: {disk.calls[-1]}"
                    checkpoint.save(folder, snapshot(new).draft())
                    checkpoint.prune(folder, None)
                    found, _ = checkpoint.newest(folder)
                    assert found is not None and found.step == new and is_whole(found)
                    assert not list((folder / checkpoint.FOLDER).glob(".*"))
        assert told.times > 60


def test_the_writer_tells_of_no_checkpoint_that_failed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    log = EventLog(folder)
    writer = CheckpointWriter(folder, log)
    writer.put(snapshot(1), 1)
    writer.wait()
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, folder, at=5, only=checkpoint.FOLDER)
        writer.put(snapshot(2), 2)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    assert [event["step"] for event in events(folder, "checkpoint")] == [1]


@pytest.mark.parametrize("once", [True, False])
def test_the_log_keeps_its_numbers_on_a_full_disk(tmp_path: Path, once: bool) -> None:
    """A line that did not fit never comes out later, beside another one with its number."""
    at, failed = 0, True
    while failed:
        at += 1
        folder = folder_with(tmp_path)
        told = []
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, folder, at=at, once=once)
            try:
                log = EventLog(folder, interval=0.0)
                for step in range(1, 6):
                    try:
                        log.metric({"step": step, "loss": 1.0 / step})
                    except OSError:
                        continue
                    told.append(step)
                log.close()
            except OSError:
                pass
            failed = disk.failed
        path = folder / "events.jsonl"
        found = [event for event, _ in read_events(path)] if path.exists() else []
        assert [event.seq for event in found] == list(range(1, len(found) + 1)), disk.calls[-1]
        rows = [row["step"] for event in found for row in event.data["rows"]]
        assert rows == sorted(set(rows)) and set(told) <= set(rows), "what was told stands there, and nothing twice"


def test_a_file_beside_goes_when_it_did_not_fit(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": True})
    for at in range(1, 5):
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, tmp_path, at=at, once=True)
            with pytest.raises(OSError, match="No space left"):
                write_json(tmp_path / "a.json", {"new": "x" * 9000})
            assert disk.failed
        assert (tmp_path / "a.json").read_text() == '{\n "old": true\n}' and len(list(tmp_path.iterdir())) == 1


def test_a_run_whose_disk_is_full_says_so_and_goes_on_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    """From the k-th call on nothing fits any more: log, checkpoints, result. Then there is space again."""
    recipe: Recipe = tiny.recipe(METHODS, max_steps=6, checkpoint_every=2, evaluations=1)
    whole = lay(tmp_path / "whole", recipe)
    with pytest.MonkeyPatch.context() as patch:
        calls = FullDisk(patch, whole).calls
        assert run_folder(whole)["outcome"] == "succeeded"
    num = often("BONSAI_DRILL_DISK", 4)
    places = range(2, len(calls) + 1) if not num else [2 + (len(calls) - 2) * n // max(1, num - 1) for n in range(num)]
    with drill(
        "disk full in a real run",
        f"the disk is full from the k-th of {len(calls)} writes, fsyncs, renames and new files of a run on (log, checkpoints, export, result), then has space again",
        unit="runs",
        place=f"{PLACE} -k same_bits",
        setting="BONSAI_DRILL_DISK",
    ) as told:
        for at in places:
            folder = lay(tmp_path / "full", recipe)
            with pytest.MonkeyPatch.context() as patch:
                disk = FullDisk(patch, folder, at=at)
                result = run_folder(folder)
            assert disk.failed
            why = (at, disk.calls[at - 1], result["message"])
            assert (result["outcome"], result["reason"]) == ("failed", "environment"), why
            assert "No space left on device" in result["message"] and "The disk is full." in result["message"], why
            assert not (folder / RESULT).exists() and exit_code(folder, result) == 74, why
            assert all(checkpoint.load(path) for path in checkpoint.listed(folder)), (
                "every one that has its name is whole"
            )
            assert run_folder(folder)["outcome"] == "succeeded", why
            assert_same_run(folder, whole)
            assert [row["step"] for row in metric_rows(folder)] == list(range(1, 7)), why
            seqs = [event.seq for event, _ in read_events(folder / "events.jsonl")]
            assert seqs == list(range(1, len(seqs) + 1)), why
            assert (folder / "artifact" / "manifest.json").exists(), why
            told.times += 1
            shutil.rmtree(folder)
