"""Checkpoints: safetensors, JSON and raw generator bytes, written beside and renamed, verified tensor by tensor when read.

checkpoints/step-00000040/
    trainables.safetensors   what learns (fp32)
    optimizer.safetensors    optimizer state, "<trainable>/<key>"
    state.safetensors        tensors of parts, generator states (uint8), running statistics, the order of the epoch
    state.json               clock, JSON state of parts and optimizer, best evaluation, event number
    manifest.json            hash of every tensor and of state.json, and of itself
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.recipe import canonical
from engine.io.tensors import DamagedFile, load_tensors, save_tensors

FOLDER = "checkpoints"
_BEFORE = ".before.tmp"
_FILES = ("trainables", "optimizer", "state")


@dataclass(kw_only=True)
class Snapshot:
    """Everything a run is made of at a step border."""

    step: int
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def draft(self) -> Draft:
        """As it will stand on the disk: the values are text now, the tensors are still those of the run."""
        files = dict(zip(_FILES, (self.trainables, self.optimizer, self.tensors), strict=True))
        return Draft(step=self.step, files=files, text=canonical(self.values))


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A snapshot on its way to the disk: the tensors of each file, and the text of state.json."""

    step: int
    files: dict[str, dict[str, Tensor]]
    text: str


def save(folder: Path, draft: Draft) -> Path:
    """Write a checkpoint beside its final place and rename it there; a crash leaves the old state or the new one, never a mixture."""
    root = folder / FOLDER
    root.mkdir(exist_ok=True)
    target = root / f"step-{draft.step:08d}"
    beside = root / f".{target.name}.{os.getpid()}.tmp"
    before = root / f".{target.name}{_BEFORE}"
    _put_back(root)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        manifest: dict[str, Any] = {"step": draft.step, "tensors": {}}
        for name, tensors in draft.files.items():
            manifest["tensors"][name] = save_tensors(beside / f"{name}.safetensors", tensors)
        _write(beside / "state.json", draft.text)
        manifest["state.json"] = _digest(draft.text)
        manifest["self"] = _digest(canonical(manifest))
        _write(beside / "manifest.json", canonical(manifest))
        _sync_folder(beside)
        if target.exists():
            target.rename(before)
        beside.rename(target)
    except BaseException:
        # On a full disk half a checkpoint would be in the way of everything else.
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            _put_back(root)
        raise
    shutil.rmtree(before, ignore_errors=True)
    _sync_folder(root)
    return target


def load(path: Path, *, optimizer: bool = True) -> Snapshot:
    """Read and verify one checkpoint, with or without the optimizer's state; raises DamagedFile when any byte that matters is not what was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        claimed = manifest.pop("self")
        text = (path / "state.json").read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise DamagedFile(f"The checkpoint {path.name} is incomplete.") from error
    if claimed != _digest(canonical(manifest)) or manifest["state.json"] != _digest(text):
        raise DamagedFile(f"The checkpoint {path.name} was changed after it was written.")
    read = {
        name: load_tensors(path / f"{name}.safetensors", manifest["tensors"][name])
        for name in _FILES
        if optimizer or name != "optimizer"
    }
    return Snapshot(
        step=manifest["step"],
        trainables=read["trainables"],
        optimizer=read.get("optimizer", {}),
        tensors=read.get("state", {}),
        values=json.loads(text),
    )


def newest(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest intact checkpoint, and a sentence for each damaged one that was passed over (and set aside)."""
    complaints: list[str] = []
    _put_back(folder / FOLDER)
    for path in reversed(listed(folder)):
        try:
            return load(path), complaints
        except DamagedFile as error:
            complaints.append(
                f"The checkpoint {path.name} is damaged and was set aside; the one before is used. {error}"
            )
            path.rename(path.with_name(f"damaged-{path.name}"))
    return None, complaints


def listed(folder: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    return sorted((folder / FOLDER).glob("step-*"))


def prune(folder: Path, best_step: int | None, keep_last: int = 2) -> None:
    """Keep the last ones and the best; clear what a crash left half written."""
    _put_back(folder / FOLDER)
    paths = listed(folder)
    for path in paths[:-keep_last]:
        if int(path.name.removeprefix("step-")) != best_step:
            shutil.rmtree(path, ignore_errors=True)
    for path in (folder / FOLDER).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def generator_states(own: dict[str, torch.Generator], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every generator that a run may draw from: torch, CUDA, numpy, python, and the run's own."""
    tensors = {"rng/torch": torch.get_rng_state(), **{f"rng/own/{name}": g.get_state() for name, g in own.items()}}
    if device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["rng/numpy"] = torch.from_numpy(np.asarray(keys).view(np.uint8).copy())
    version, internal, gauss = random.getstate()
    return tensors, {
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def restore_generators(
    tensors: dict[str, Tensor], values: dict[str, Any], own: dict[str, torch.Generator], device: torch.device
) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(tensors["rng/torch"])
    for name, generator in own.items():
        generator.set_state(tensors[f"rng/own/{name}"])
    if device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
    kind, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, tensors["rng/numpy"].numpy().view(np.uint32), position, has_gauss, cached))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that change by running the model (batch norm), by name."""
    moving = ("running_mean", "running_var", "num_batches_tracked")
    return {f"buffer/{name}": buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in moving}


def split_state(prefix: str, state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate a part's state into tensors ("<prefix>/<key>") and JSON values."""
    tensors = {f"{prefix}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def join_state(prefix: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`."""
    mine = {key.removeprefix(prefix + "/"): value for key, value in tensors.items() if key.startswith(prefix + "/")}
    return {**values, **mine}


def _put_back(root: Path) -> None:
    """Give a checkpoint its name back that was to make room for a newer one of the same step, when that one never came."""
    for before in root.glob(f".step-*{_BEFORE}"):
        target = root / before.name.removeprefix(".").removesuffix(_BEFORE)
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(target)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
