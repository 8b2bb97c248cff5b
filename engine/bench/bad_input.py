"""Bad input as a newcomer would give it: each case goes through the real check, and the sentence that comes back is written down."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.bench.pages import Goal, Section, Study
from engine.core.errors import EngineError, RecipeError
from engine.core.recipe import parse_recipe
from engine.ops.check import check

Change = Callable[[dict[str, Any], Path], None]


def measure() -> list[Section]:
    """Run the study and return its tables."""
    section = Section(
        title="What was tried, and what the studio says",
        intro="The same sentences stand at the field in the form, in the REST answer (422, all faults at once) and on the command line. "
        "No case reaches a training process.",
        columns=("what somebody does", "what the studio says"),
    )
    refused = 0
    with tempfile.TemporaryDirectory(prefix="bonsai-bad-") as home:
        for number, (title, change) in enumerate(CASES.items()):
            folder = Path(home) / str(number)
            folder.mkdir()
            said = _said(change, folder)
            refused += bool(said)
            section.rows.append(
                (
                    title,
                    (said or "(nothing: it was accepted)")
                    .replace(str(folder), "…")
                    .replace("|", "/")
                    .replace("\n", " "),
                )
            )
    section.goals.append(
        Goal(
            goal="bad input refused in a sentence",
            value=refused,
            target=len(CASES),
            better="more",
            unit="cases",
            baseline="–",
        )
    )
    section.remarks.append(f"{refused} of {len(CASES)} cases were refused in sentences.")
    return [section]


def _said(change: Change, folder: Path) -> str:
    recipe: dict[str, Any] = {
        "task": "classify",
        "model": {"source": "starter:minilm-l6"},
        "data": {"source": "starter:customer-messages", "columns": {"text": "message", "label": "topic"}},
        "methods": [{"slug": "paca"}],
        "settings": {},
    }
    change(recipe, folder)
    try:
        return " ".join(str(fault) for fault in check(parse_recipe(recipe)).faults)
    except RecipeError as error:
        return " ".join(str(fault) for fault in error.faults)
    except EngineError as error:
        return str(error.fault)


def _file(name: str, content: bytes) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        path = folder / name
        path.write_bytes(content)
        recipe["data"] = {"source": f"file:{path}"}

    return change


def _merge(**changes: Any) -> Change:
    return lambda recipe, folder: recipe.update(changes)


def _model(make: Callable[[Path], None]) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        make(folder)
        recipe["model"] = {"source": f"folder:{folder}"}

    return change


def _config_only(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 100})
    )
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")


def _pickled(folder: Path) -> None:
    _config_only(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def _brings_code(folder: Path) -> None:
    _config_only(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "code.Model"}}))


def _truncated(folder: Path) -> None:
    from engine.io.facts import locate_model

    for path in locate_model("starter:bonsai-stories").iterdir():
        shutil.copy(path, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


CASES: dict[str, Change] = {
    "uploads an empty file": _file("empty.csv", b""),
    "uploads a header and no rows": _file("header.csv", b"message,topic\n"),
    "uploads a picture called .csv": _file("photo.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20),
    "uploads a zip archive": _file("table.csv", b"PK\x03\x04" + bytes(200)),
    "uploads a file with one label only": _file(
        "one.csv", b"text,label\n" + b"".join(b"message %d,yes\n" % n for n in range(40))
    ),
    "uploads five rows": _file(
        "five.csv", b"text,label\n" + b"".join(b"message %d,%s\n" % (n, b"ab"[n % 2 : n % 2 + 1]) for n in range(5))
    ),
    "uploads a line of 10 MB": _file("long.csv", b"text,label\nshort,a\n" + b"x" * 10_000_000 + b",b\n"),
    "uploads Latin-1 text": _file("latin.csv", b"text,label\n" + b"caf\xe9 %d,a\n" % 1 + b"th\xe9,b\n" * 20),
    "uploads JSON lines with a slip in line 3": _file(
        "rows.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n{"text": "c", label}\n'
    ),
    "names a column that is not there": _merge(
        data={"source": "starter:customer-messages", "columns": {"text": "body", "label": "topic"}}
    ),
    "sorts texts with data that have no labels": _merge(data={"source": "starter:village-instructions"}),
    "picks a file that is gone": _merge(data={"source": "file:nowhere.csv"}),
    "picks a model folder without weights": _model(_config_only),
    "picks a model whose weights are a pickle": _model(_pickled),
    "picks a model that brings its own code": _model(_brings_code),
    "picks a model whose weights were cut off": _model(_truncated),
    "picks a hub model without a connection": _merge(model={"source": "hub:nobody/no-such-model"}),
    "asks an encoder to write": _merge(
        task="causal_lm", data={"source": "starter:customer-messages", "columns": {"text": "message"}}
    ),
    "picks two methods for the same weights": _merge(methods=[{"slug": "paca"}, {"slug": "lora"}]),
    "picks two schedules": _merge(methods=[{"slug": "paca"}, {"slug": "cosine"}, {"slug": "linear"}]),
    "picks no method": _merge(methods=[]),
    "misspells a method": _merge(methods=[{"slug": "pacca"}]),
    "asks for more columns than a layer has": _merge(methods=[{"slug": "paca", "params": {"r": 4000}}]),
    "types a negative learning rate and a word for a number": _merge(settings={"learning_rate": -1, "epochs": "many"}),
    "types a setting that does not exist": _merge(settings={"batchsize": 4}),
}

STUDY = Study(name="bad-input", page="bad-input.md", minutes=0.5, quick=True, seed=0, run=measure)
