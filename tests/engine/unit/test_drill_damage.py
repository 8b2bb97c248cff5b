"""Half-written and damaged checkpoints: every damage is seen, it is said in a sentence, and the checkpoint before is used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from engine.io.tensors import DamagedFile
from engine.train import checkpoint
from tests.drills import drill, often
from tests.engine.unit.test_drill_disk import folder_with, is_whole

SEED = 20263
DAMAGES = ("cut off", "zeroed tail", "flipped bit", "missing", "file of the step before")


def spoil(path: Path, before: Path, damage: str, dice: random.Random) -> None:
    """Do to one file what a disk or a lost power does; it is never the same file afterwards."""
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
        return
    if damage == "file of the step before":
        shutil.copy(before, path)
        return
    body = bytearray(raw)
    while bytes(body) == raw:
        place = dice.randrange(len(raw))
        if damage == "cut off":
            body = bytearray(raw[:place])
        elif damage == "zeroed tail":
            body[place:] = bytes(len(raw) - place)
        else:
            body[place] ^= 1 << dice.randrange(8)
    path.write_bytes(body)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_seen_and_the_checkpoint_before_is_used(tmp_path: Path, damage: str) -> None:
    dice = random.Random(f"{SEED} {damage}")
    clean = folder_with(tmp_path, 2, 3).rename(tmp_path / "clean")
    with drill(
        f"damaged checkpoint: {damage}",
        "one file of the newest checkpoint, drawn at random with the place in it; the damage has to be seen and the one before to be used",
        unit="damages",
        place=f"tests/engine/unit/test_drill_damage.py -k '{damage}'",
        setting="BONSAI_DRILL_DAMAGE",
    ) as told:
        folder = tmp_path / "job"
        for _ in range(often("BONSAI_DRILL_DAMAGE", 20)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(clean, folder)
            last, before = (checkpoint.listed(folder)[place] for place in (-1, -2))
            path = dice.choice(sorted(last.iterdir()))
            spoil(path, before / path.name, damage, dice)
            told.times += 1
            found, complaints = checkpoint.newest(folder)
            seen = found is not None and found.step == 2 and is_whole(found)
            told.violations += not (
                seen and len(complaints) == 1 and "set aside" in complaints[0] and last.name in complaints[0]
            )
            assert (folder / checkpoint.FOLDER / f"damaged-{last.name}").exists(), path.name
        assert told.violations == 0


def test_a_half_written_checkpoint_is_never_one(tmp_path: Path) -> None:
    """Whatever is left beside under its temporary name is neither listed nor read, and goes with the next one."""
    folder = folder_with(tmp_path, 2, 3)
    half = folder / checkpoint.FOLDER / ".step-00000004.1.tmp"
    shutil.copytree(checkpoint.listed(folder)[-1], half)
    (half / "manifest.json").unlink()
    found, complaints = checkpoint.newest(folder)
    assert found is not None and found.step == 3 and not complaints
    checkpoint.prune(folder, None)
    assert not half.exists()


def test_the_one_that_made_room_gets_its_name_back(tmp_path: Path) -> None:
    """The process died between the two renames that put a checkpoint in the place of one of the same step."""
    folder = folder_with(tmp_path, 2, 3)
    last = checkpoint.listed(folder)[-1]
    last.rename(last.with_name(f".{last.name}.before.tmp"))
    found, complaints = checkpoint.newest(folder)
    assert found is not None and found.step == 3 and is_whole(found) and not complaints


def test_when_nothing_whole_is_left_that_is_said(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 2, 3)
    for path in checkpoint.listed(folder):
        (path / "manifest.json").write_bytes(b"")
        with pytest.raises(DamagedFile, match="incomplete"):
            checkpoint.load(path)
    found, complaints = checkpoint.newest(folder)
    assert found is None and len(complaints) == 2
