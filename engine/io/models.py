"""Transformers models and tokenizers from a local folder: safetensors only, no remote code, no network, no noise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from engine.core.facts import ModelFacts
from engine.io.sources import is_complete, locate_model, model_fault

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_pad_ids: dict[tuple[Path, int], int] = {}  # of the tokenizers that this process has loaded: (folder, its time) -> id


def model_folder(facts: ModelFacts) -> Path:
    """The folder with the weights; fetches them when the facts were gathered without."""
    folder = Path(facts.path)
    return folder if is_complete(folder) else locate_model(facts.source)


def load_config(folder: Path, **changes: Any) -> Any:
    """The model's configuration, with changes such as the names of labels."""
    quiet()
    try:
        return transformers.AutoConfig.from_pretrained(folder, **_LOCAL, **changes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise model_fault("This model's configuration cannot be used.", _first_line(error),
                          "Choose a model of a family that transformers knows.", "bad_config") from error  # fmt: skip


def load_model(
    folder: Path, auto_class: str, *, dtype: torch.dtype, config: Any, seed: int, renew_heads: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model in eval mode on the CPU, and the names of its parameters that the folder has no weights for.

    Those parameters are initialised from `seed` alone; no global generator moves. `renew_heads` treats whatever lies outside of the model's
    body as missing, because a head that was trained for other labels is worth nothing.
    """
    quiet()
    loader = getattr(transformers, auto_class)
    arguments = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True, **_LOCAL}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, report = _with_sdpa(loader, folder, arguments)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise model_fault("This model could not be loaded.", _first_line(error), "Copy or fetch the model again, or choose another.",
                              "cannot_load") from error  # fmt: skip
    names = {name for name, _ in model.named_parameters()}
    fresh = (set(report["missing_keys"]) | {item[0] for item in report["mismatched_keys"]}) & names
    body = f"{model.base_model_prefix}."
    lost = sorted(name for name in fresh if name.startswith(body) and ".pooler." not in name)
    if lost:
        raise model_fault("The weights do not belong to this model.", f"{len(lost)} tensors are missing or have another shape, first {lost[0]}.",
                          "Copy or fetch the model again.", "wrong_weights")  # fmt: skip
    if renew_heads:
        fresh |= {name for name in names if not name.startswith(body)}
    _initialise(model, sorted(fresh), seed)
    return model.eval(), tuple(sorted(fresh))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; a pad token is guaranteed."""
    quiet()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # tokenizers of many kinds fail in many ways, all of them in the files
        raise model_fault("This model's tokenizer cannot be used.", _first_line(error), "Copy or fetch the model again, or choose another.",
                          "bad_tokenizer") from error  # fmt: skip
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    _pad_ids[folder, folder.stat().st_mtime_ns] = tokenizer.pad_token_id
    return tokenizer


def pad_token_id(folder: Path) -> int:
    """The pad token of the folder's tokenizer, which is loaded only when it was not loaded before."""
    known = _pad_ids.get((folder, folder.stat().st_mtime_ns))
    return int(load_tokenizer(folder).pad_token_id) if known is None else known


def base_of(model: nn.Module) -> nn.Module:
    """The body below the heads."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    return body if isinstance(body, nn.Module) else model


def _with_sdpa(loader: Any, folder: Path, arguments: dict[str, Any]) -> Any:
    ignore = {"ignore_mismatched_sizes": True}
    try:
        return loader.from_pretrained(folder, attn_implementation="sdpa", **arguments, **ignore)
    except ValueError as error:
        if "attention" not in str(error).lower():
            raise
        return loader.from_pretrained(folder, attn_implementation="eager", **arguments, **ignore)


def _initialise(model: nn.Module, fresh: list[str], seed: int) -> None:
    """Matrices normal with the config's spread, scales one, offsets zero, drawn in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    spread = float(getattr(model.config, "initializer_range", 0.02) or 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in fresh:
            parameter = parameters[name]
            if parameter.dim() >= 2:
                parameter.copy_(torch.normal(0.0, spread, parameter.shape, generator=generator))
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


@functools.cache
def quiet() -> None:
    """Keep transformers from printing reports and bars; what matters is said in our own sentences."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"The loader says: {text[:300].rstrip('.')}."
