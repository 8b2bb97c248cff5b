"""The *transform* operation: model folders in, one model folder out, tensor by tensor, so that no model is ever in memory as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.artifact import hash_file
from engine.core.control import write_json
from engine.core.errors import Fault, RecipeError, bad_input
from engine.core.method import TransformMethod
from engine.core.registry import catalogue
from engine.io.tensors import DTYPES, TensorReader, TensorWriter

WEIGHTS, INDEX, RECORD = "model.safetensors", "model.safetensors.index.json", "transform.json"
_BESIDE_WEIGHTS = {".json", ".txt", ".model", ".jinja"}  # config, tokenizer, vocabulary, chat template
_NEVER_COPIED = {INDEX, RECORD, "adapter_config.json"}


class ModelFolder:
    """A model folder whose tensors are read one at a time; its weights lie in one safetensors file or in several with an index."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder, self.where = folder, where
        self.files = _weight_files(folder, where)
        self._stack = ExitStack()
        self._home: dict[str, TensorReader] = {}
        for file in self.files:
            reader = self._stack.enter_context(TensorReader(file))
            self._home.update(dict.fromkeys(reader, reader))
        self.shapes: dict[str, tuple[int, ...]] = {
            name: reader.header[name].shape for name, reader in self._home.items()
        }
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (DTYPES[reader.header[name].dtype], reader.header[name].shape) for name, reader in self._home.items()
        }

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __getitem__(self, name: str) -> Tensor:
        return self._home[name][name]

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@dataclass(kw_only=True)
class TransformContext:
    """What a transformation may say about itself; it ends up in the record beside the weights."""

    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutFolder:
    """Where the new weights go: `with out.weights(layout) as writer`, then `writer.put(name, tensor)` in `writer.order`."""

    folder: Path

    def weights(self, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> TensorWriter:
        return TensorWriter(self.folder / WEIGHTS, layout, {"format": "pt"})


def transform(slug: str, params: Mapping[str, Any], sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Apply a transformation to model folders; returns the record that lies beside the new weights.

    Configuration and tokenizer come from the first source. The result appears under its name only when it is complete.
    """
    method = _method(slug)
    parsed, faults = method.parse(dict(params), "params")
    if faults:
        raise RecipeError(faults)
    if out.exists():
        raise bad_input(
            "out",
            f"There is already something called {out.name}.",
            "A result never overwrites another.",
            "Choose a new name.",
            "taken",
        )
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        ctx = TransformContext()
        with ExitStack() as stack:
            inputs = [stack.enter_context(ModelFolder(path, f"sources[{place}]")) for place, path in enumerate(sources)]
            method(parsed).apply(inputs, OutFolder(beside), ctx)
            parents = [
                {"name": one.folder.name, "sha256": {file.name: hash_file(file) for file in one.files}}
                for one in inputs
            ]
        for file in sorted(sources[0].iterdir()):
            if file.is_file() and file.suffix in _BESIDE_WEIGHTS and file.name not in _NEVER_COPIED:
                shutil.copyfile(file, beside / file.name)
        record = {
            "method": slug,
            "version": method.version,
            "params": parsed.model_dump(mode="json"),
            "parents": parents,
            "report": ctx.report,
        }
        write_json(beside / RECORD, record)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return record


def _method(slug: str) -> type[TransformMethod]:
    known = {name: method for name, method in catalogue().items() if issubclass(method, TransformMethod)}
    if slug not in known:
        raise RecipeError(
            [
                Fault(
                    where="method",
                    what=f"There is no transformation called '{slug}'.",
                    why="It is neither built in nor offered by an installed package.",
                    way_out=f"Choose one of: {', '.join(known)}.",
                    code="unknown_method",
                )
            ]
        )
    return known[slug]


def _weight_files(folder: Path, where: str) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(index.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names:
        raise bad_input(
            where,
            f"The folder {folder.name} holds no model.",
            "A model folder has its weights in safetensors files; other formats may hold code and are not read.",
            "Choose a folder with model.safetensors in it.",
            "no_weights",
        )
    if any(Path(name).name != name for name in names):  # an index may not reach outside of its folder
        raise bad_input(where, f"The index of {folder.name} names a file outside of the folder.", "That could read anything on this machine.",
                        "Download the model again from a source you trust.", "outside_file")  # fmt: skip
    return [folder / name for name in names]
