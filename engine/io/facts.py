"""Facts about models, data and this machine, gathered without loading a weight. Importing this module loads no torch; asking for a model does."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from engine.core.errors import EngineError
from engine.core.facts import DataFacts, MachineFacts, ModelFacts
from engine.core.recipe import DataRef
from engine.io.datasets import inspect
from engine.io.headers import TensorInfo, UnreadableHeader, read_header
from engine.io.lines import file_fault
from engine.io.sources import STARTERS, hub_header, is_complete, locate_model, model_fault, starter_models, weight_files

__all__ = ["AUTO_CLASSES", "data_facts", "locate_model", "machine_facts", "model_facts", "starter_models"]

# Which official loader gives a model the shape that a task trains it in.
AUTO_CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "instruct": "AutoModelForCausalLM",
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

    folder = Path(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise model_fault("This model has no tokenizer.", f"None of {', '.join(_TOKENIZER_FILES[:3])} is there.",
                          "Copy the tokenizer files of the model into its folder.", "no_tokenizer")  # fmt: skip
    header = _header(folder, source)
    config = load_config(folder)
    kind = _kind(config)
    skeleton = _skeleton(config, AUTO_CLASSES.get(task or "", _BY_KIND[kind]))
    tensors, linears = _names(skeleton, header)
    floats = [info for info in header.values() if info.is_float]
    sizes: dict[str, int] = {}
    for info in floats:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + _count(info)
    text = config.get_text_config()
    return ModelFacts(
        source=source, path=path, family=str(config.model_type), kind=kind, architecture=(config.architectures or [type(skeleton).__name__])[0],
        num_parameters=sum(sizes.values()), num_layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0), vocab_size=int(getattr(text, "vocab_size", 0) or 0),
        max_positions=_max_positions(text, skeleton), dtype=max(sizes, key=lambda name: sizes[name], default="F32"),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)), has_chat_template=_has_chat_template(folder),
        tensors=tensors, linears=linears,
    )  # fmt: skip


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


def _kind(config: Any) -> str:
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return "encoder-decoder"
    masked, causal = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type in causal and (config.model_type not in masked or getattr(config, "is_decoder", False)):
        return "decoder"
    return "encoder"


def _skeleton(config: Any, auto_class: str) -> Any:
    """The model without memory for its weights: only names and shapes."""
    import torch
    import transformers

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise model_fault(f"A {config.model_type} model cannot be used for this goal.", f"There is no {auto_class} for it.",
                          "Choose another model, or another goal.", "wrong_model_kind") from error  # fmt: skip


def _names(
    skeleton: Any, header: dict[str, TensorInfo]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    """Parameters that the files hold, and the ordinary linear layers among them, without output layers and task heads."""
    from torch import nn

    prefix = f"{skeleton.base_model_prefix}."
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    stored = {name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in header}
    known = {
        name for name in shapes if name in stored or name.removeprefix(prefix) in stored or prefix + name in stored
    }
    if len(known) * 2 < len(shapes):
        known = {
            name for name in shapes if name.startswith(prefix)
        }  # transformers renames this family's tensors while it loads them
    output = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear and module is not output and name.startswith(prefix) and f"{name}.weight" in known
    }
    inside = {name for name in known if name.startswith(prefix)}
    heads = (
        known - inside if output is not None else set()
    )  # a classifier belongs to its labels, so it is never part of the base
    return {name: shapes[name] for name in shapes if name in inside | heads}, linears


def _count(info: TensorInfo) -> int:
    from math import prod

    return prod(info.shape)


def _max_positions(config: Any, skeleton: Any) -> int:
    named = next(
        (
            getattr(config, name)
            for name in ("max_position_embeddings", "n_positions", "max_seq_len")
            if getattr(config, name, None)
        ),
        0,
    )
    for name, module in skeleton.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return (
                int(module.num_embeddings) - int(module.padding_idx) - 1
            )  # such models count positions from behind the pad token
    return int(named) or 512


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
    from dataclasses import replace

    return replace(inspect(Path(path), mapping=dict(mapping) if mapping else None).facts, source=source)


def _starter_data(name: str) -> tuple[Path, dict[str, str]]:
    folder = STARTERS / "data"
    entries = {entry["name"]: entry for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))}
    if name not in entries:
        raise EngineError(file_fault(f"There is no starter data '{name[:80]}'.", f"The starter data are: {', '.join(entries)}.",
                                     "Choose one of them.", "unknown_starter"))  # fmt: skip
    return folder / entries[name]["file"], dict(entries[name]["columns"])


# ── this machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def machine_facts() -> MachineFacts:
    """The device a run would use. Asks the driver, not CUDA, so that this process may still fork."""
    import torch

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        name, memory, capability = _gpu()
        return MachineFacts(
            device="cuda",
            device_name=name,
            memory_bytes=memory,
            num_threads=torch.get_num_threads(),
            has_bf16=capability >= 8,
        )
    flags = _cpu_line("flags")
    return MachineFacts(device="cpu", device_name=_cpu_line("model name") or "CPU", memory_bytes=_memory(), num_threads=torch.get_num_threads(),
                        has_bf16="avx512_bf16" in flags or "amx_bf16" in flags)  # fmt: skip


def _gpu() -> tuple[str, int, int]:
    """Name, memory and major compute capability of the first visible GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(visible))
                if visible.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(visible)
            )
            name = pynvml.nvmlDeviceGetName(handle)
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            return str(name), memory, int(pynvml.nvmlDeviceGetCudaComputeCapability(handle)[0])
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # a container without the management library: ask CUDA itself
        import torch

        seen = torch.cuda.get_device_properties(0)
        return str(seen.name), int(seen.total_memory), int(seen.major)


def _memory() -> int:
    """Memory that this process may use: the machine's, or less where a control group says so."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


@functools.cache
def _cpu_line(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.partition(":")[0].strip() == key), "")
