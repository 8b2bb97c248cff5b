"""The *transform* operation: model folders in, one model folder out, tensor by tensor, so that no model is ever in memory as a whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.artifact import hash_file
from engine.core.control import Control, write_json
from engine.core.errors import Fault, RecipeError, bad_input
from engine.core.events import EventLog
from engine.core.method import Chosen, TransformMethod
from engine.core.registry import catalogue
from engine.io.tensors import DTYPES, TensorReader, TensorWriter
from engine.ops.check import Checked
from engine.ops.work import Interrupted, WorkContext, describe_work, leave, write_artifact, write_reference
from engine.train.parts import seeded
from engine.train.run import Ending

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


@dataclass(frozen=True)
class OutFolder:
    """Where the new weights go: `with out.weights(layout) as writer`, then `writer.put(name, tensor)` in `writer.order`."""

    folder: Path

    def weights(self, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> TensorWriter:
        return TensorWriter(self.folder / WEIGHTS, layout, {"format": "pt"})


def transform(slug: str, params: Mapping[str, Any], sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Apply a transformation that needs no data to model folders; returns the record that lies beside the new weights."""
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
    if method.needs_data:
        raise bad_input("data", f"{method.card.title} needs examples to look at.", "They are part of a recipe.",
                        "Write a recipe with the operation 'transform', and run that.", "missing")  # fmt: skip
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        record = _apply(method(parsed), sources, beside, TransformContext())
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return record


class TransformContext:
    """What a transformation may use and say. In a job it is an engine.ops.work.WorkContext; this one stands alone, without data."""

    def __init__(self, seed: int = 17) -> None:
        self.seed = seed
        self.report: dict[str, Any] = {}
        self.notes: list[str] = []
        self.recipe: Any = None

    def note(self, sentence: str, level: str = "info") -> None:
        """Say something to the person who watches."""
        self.notes.append(sentence)

    def progress(self, done: int, total: int) -> None:
        """Say how far the work is; a border at which the job may be left."""

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator from (seed, name)."""
        return seeded(self.seed, "transform", name)


def _apply(method: TransformMethod, sources: Sequence[Path], beside: Path, ctx: Any) -> dict[str, Any]:
    """Write the new weights with the configuration and tokenizer of the first source; returns the record, which is written too."""
    with ExitStack() as stack:
        inputs = [stack.enter_context(ModelFolder(path, f"sources[{place}]")) for place, path in enumerate(sources)]
        method.apply(inputs, OutFolder(beside), ctx)
        parents = [
            {"name": one.folder.name, "sha256": {file.name: hash_file(file) for file in one.files}} for one in inputs
        ]
    for file in sorted(sources[0].iterdir()):
        wanted = file.is_file() and file.suffix in _BESIDE_WEIGHTS and file.name not in _NEVER_COPIED
        if wanted and not (beside / file.name).exists():  # what the method has written itself stays
            shutil.copyfile(file, beside / file.name)
    record = {
        "method": method.card.slug,
        "version": method.version,
        "params": method.params.model_dump(mode="json"),
        "parents": parents,
        "report": ctx.report,
    }
    write_json(beside / RECORD, record)
    return record


def run(checked: Checked, folder: Path, log: EventLog, control: Control, *, nested: bool = False) -> Ending:
    """The *transform* operation as a job: new weights, the scores of every input and of the result where data are given, a sealed artifact."""
    facts, lead, began = checked.facts, checked.composition.chosen[0], time.monotonic()
    assert facts is not None
    recipe = checked.recipe
    ctx = WorkContext(recipe, facts, lead, folder, log, control)
    log.emit("state", {"state": "running", "message": f"{lead.method.card.title} is making new weights."})
    sources = [Path(model.path) for model in (facts.model, *facts.models)]
    work = folder / ".transform.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _apply(lead.method(lead.params), sources, work, ctx)
        log.emit("state", {"state": "evaluating", "message": "Measuring the result."})
        scores = _measured(ctx, work, log)
        ending = Ending(reason="completed", message=_said(lead, len(sources), scores))
        model = ctx.inputs.load_folder(work)

        def fill(beside: Path) -> None:
            work.rename(beside / "merged")
            write_reference(ctx.inputs, model, beside)

        table = tuple({"model": name, **row} for name, row in scores.items())
        description = describe_work(
            checked, lead, kind="model", ending=ending, forms={"merged": "transformers"}, seconds=time.monotonic() - began,
            metrics=scores.get("result", {}), before=scores.get("model 1", {}), notes=ctx.notes,
            report={**ctx.report, "table": list(table)},
            baseline={"name": "the first model as it was", "sentence": "The first model was measured as it was, on the same examples.",
                      **scores.get("model 1", {})} if scores else {},
        )  # fmt: skip
        write_artifact(folder, recipe, description, log, fill, certify=not nested)
    except Interrupted as error:
        return leave(error)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ending


def _measured(ctx: WorkContext, work: Path, log: EventLog) -> dict[str, dict[str, Any]]:
    """Held-out scores of every input and of the result; empty without data."""
    if ctx.recipe.data is None:
        return {}
    count = 1 + len(ctx.recipe.models)
    scores = {}
    for index in range(count):
        scores[f"model {index + 1}"] = ctx.inputs.evaluate(ctx.load_model(index))
        ctx.progress(index + 1, count + 1)
    scores["result"] = ctx.inputs.evaluate(ctx.inputs.load_folder(work))
    log.emit("evaluation", {**scores["result"], "best": True})
    return scores


def _said(lead: Chosen, count: int, scores: Mapping[str, Mapping[str, Any]]) -> str:
    models = "one model" if count == 1 else f"{count} models"
    text = f"{lead.method.card.title} made a new model from {models}."
    if scores:
        text += f" Its held-out loss is {scores['result']['eval_loss']:.4g}; that of the first model is {scores['model 1']['eval_loss']:.4g}."
    return text


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
