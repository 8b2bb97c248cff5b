"""Facts about models, data and this machine, gathered without loading a weight. Importing this module loads no torch; asking does."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.core.control import write_json
from engine.core.errors import EngineError
from engine.core.facts import DataFacts, MachineFacts, ModelFacts
from engine.core.recipe import DataRef
from engine.io.datasets import file_sha256, inspect
from engine.io.headers import TensorInfo, UnreadableHeader, read_header
from engine.io.lines import file_fault
from engine.io.sources import STARTERS, hub_header, is_complete, locate_model, model_fault, starter_models, weight_files

__all__ = ["AUTO_CLASSES", "data_facts", "locate_model", "machine_facts", "model_facts", "starter_models"]

# Which official loader gives a model the shape that a task trains it in.
AUTO_CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "instruct": "AutoModelForCausalLM",
    "verifiable": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
}
_BY_KIND = {
    "encoder": "AutoModelForSequenceClassification",
    "decoder": "AutoModelForCausalLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_MAX_CONFIG_BYTES = 5_000_000
_MAX_KEPT_FACTS = 1000


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def model_facts(source: str, *, task: str | None = None) -> ModelFacts:
    """What config.json, the tokenizer files and the headers of the weights tell about a model.

    `tensors` and `linears` carry the names of the model as `task` loads it (without a task: as its kind is usually loaded). Weights that the
    folder does not hold, such as a new classifier, are in neither.
    """
    folder = locate_model(source, weights=False)
    _check_config(folder)
    stamp = tuple(
        (path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()
    )
    return _model_facts(source, str(folder), task, stamp)


@functools.lru_cache(maxsize=64)
def _model_facts(source: str, path: str, task: str | None, stamp: tuple[Any, ...]) -> ModelFacts:
    from engine.io.models import load_config
    from engine.io.skeleton import kind_of, max_positions, names_and_shapes, skeleton_of

    folder = Path(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise model_fault("This model has no tokenizer.", f"None of {', '.join(_TOKENIZER_FILES[:3])} is there.",
                          "Copy the tokenizer files of the model into its folder.", "no_tokenizer")  # fmt: skip
    header = _header(folder, source)
    config = load_config(folder)
    kind = kind_of(config)
    skeleton = skeleton_of(config, AUTO_CLASSES.get(task or "", _BY_KIND[kind]))
    tensors, linears = names_and_shapes(skeleton, header)
    floats = [info for info in header.values() if info.is_float]
    sizes: dict[str, int] = {}
    for info in floats:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + _count(info)
    text = config.get_text_config()
    return ModelFacts(
        source=source, path=path, family=str(config.model_type), kind=kind, architecture=(config.architectures or [type(skeleton).__name__])[0],
        num_parameters=sum(sizes.values()), num_layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0), vocab_size=int(getattr(text, "vocab_size", 0) or 0),
        max_positions=max_positions(text, skeleton), dtype=max(sizes, key=lambda name: sizes[name], default="F32"),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)), has_chat_template=_has_chat_template(folder),
        tensors=tensors, linears=linears, num_heads=int(getattr(text, "num_attention_heads", 0) or 0), dropout=_dropout(text),
    )  # fmt: skip


def _dropout(config: Any) -> float:
    """Families spell it hidden_dropout_prob, attention_dropout, resid_pdrop …; what a new head drops does not count."""
    shares = (
        value
        for name, value in config.to_dict().items()
        if ("drop" in name or "pdrop" in name) and "classifier" not in name and isinstance(value, float)
    )
    return max(shares, default=0.0)


def _check_config(folder: Path) -> None:
    """Refuse what is no model, or would need code from the model's folder."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            if name == "config.json":
                raise model_fault(
                    "This folder is not a model.",
                    "config.json is missing.",
                    "Choose the folder that save_pretrained wrote.",
                    "no_config",
                )
            continue
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise ValueError
            body = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(body, dict):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise model_fault(
                f"{name} is damaged.", "It is not a JSON object.", "Copy or fetch the model again.", "bad_config"
            ) from error
        if body.get("auto_map"):
            raise model_fault("This model brings its own program code.", f"{name} has an auto_map; code from a model is never run here.",
                              "Choose a model of a family that transformers knows by itself.", "remote_code")  # fmt: skip


def _header(folder: Path, source: str) -> dict[str, TensorInfo]:
    if source.startswith("hub:") and not is_complete(folder):
        return hub_header(source)
    found: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        try:
            found.update(read_header(path))
        except UnreadableHeader as error:
            raise model_fault(
                str(error), "The weights are not complete.", "Copy or fetch the model again.", "damaged_weights"
            ) from error
    return found


def _count(info: TensorInfo) -> int:
    from math import prod

    return prod(info.shape)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def data_facts(ref: DataRef) -> DataFacts:
    """Look at the data of a recipe; refused when the file is missing, damaged, or not the one that the recipe was made for."""
    scheme, _, name = ref.source.partition(":")
    mapping = dict(ref.columns) or None
    if scheme == "starter":
        path, columns = _starter_data(name)
        mapping = mapping or columns
    elif scheme == "file":
        path = Path(name)
    else:
        raise EngineError(file_fault(f"'{ref.source[:80]}' does not say where the data lie.", "A source begins with starter: or file:.",
                                     "Choose data from the list, or upload a file.", "unknown_source"))  # fmt: skip
    if not path.is_file():
        raise EngineError(
            file_fault(f"There is no file {path}.", "It was moved or deleted.", "Upload it again.", "no_file")
        )
    stat = path.stat()
    facts = _data_facts(
        ref.source,
        str(path),
        tuple(sorted(mapping.items())) if mapping else None,
        (stat.st_mtime_ns, stat.st_size, stat.st_ino),
    )
    if ref.sha256 is not None and facts.sha256 != ref.sha256:
        raise EngineError(file_fault("The data are not those that the recipe was made for.", "Their checksum differs: the file was changed.",
                                     "Restore the file, or make the recipe again with the new one.", "data_changed"))  # fmt: skip
    return facts


@functools.lru_cache(maxsize=64)
def _data_facts(
    source: str, path: str, mapping: tuple[tuple[str, str], ...] | None, stamp: tuple[int, ...]
) -> DataFacts:
    digest = file_sha256(Path(path))
    kept = _kept_file(digest, Path(path), mapping)
    found = _kept_facts(kept) if kept is not None else None
    if found is None:
        found = inspect(Path(path), mapping=dict(mapping) if mapping else None).facts
        if kept is not None and found.sha256 == digest:
            _keep(kept, found)
    return replace(found, source=source, path=path)


def _kept_file(digest: str, path: Path, mapping: tuple[tuple[str, str], ...] | None) -> Path | None:
    """Where the facts of this content are kept: its checksum, then a hash of whatever else decides them. None without BONSAI_HOME."""
    home = os.environ.get("BONSAI_HOME")
    if not home:
        return None
    key = hashlib.sha256(f"{path.suffix.lower()} {mapping} {_code_digest()}".encode())
    return Path(home) / "cache" / "facts" / f"{digest[:24]}-{key.hexdigest()[:40]}.json"


@functools.cache
def _code_digest() -> str:
    """A hash of the code that looks at files: facts that another version found are looked for again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept_facts(path: Path) -> DataFacts | None:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(body[name]) for name in ("columns", "labels", "label_counts")}
        found = DataFacts(**{**body, **lists})
        os.utime(path)  # used now
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _keep(path: Path, facts: DataFacts) -> None:
    with contextlib.suppress(OSError):  # a full disk stops nobody: the file is looked at again next time
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, asdict(facts))
        kept = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in kept[:-_MAX_KEPT_FACTS]:
            old.unlink(missing_ok=True)


def _starter_data(name: str) -> tuple[Path, dict[str, str]]:
    folder = STARTERS / "data"
    entries = {entry["name"]: entry for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))}
    if name not in entries:
        raise EngineError(file_fault(f"There is no starter data '{name[:80]}'.", f"The starter data are: {', '.join(entries)}.",
                                     "Choose one of them.", "unknown_starter"))  # fmt: skip
    return folder / entries[name]["file"], dict(entries[name]["columns"])


def machine_facts() -> MachineFacts:
    """The device a run would use."""
    from engine.io.machine import this_machine

    return this_machine()
