"""Small random models of every family that a side network can be built for, and one attached to them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from engine.core.facts import ModelFacts
from engine.io.facts import model_facts
from engine.io.models import base_of
from engine.methods.lst import LST
from engine.parts.ladder import Ladder, ladder_of
from tests.engine.attached import Attached, facts_for, random_batches
from tests.engine.unit.tiny_models import tiny_tokenizer

_HOME = tempfile.TemporaryDirectory(prefix="bonsai-zoo-")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 100, "num_attention_heads": 4, "max_position_embeddings": 96,
    "vocab_size": 320, "pad_token_id": 0,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "Mistral": {"num_key_value_heads": 4, "sliding_window": 12},
}
ENCODERS: dict[str, dict[str, Any]] = {"Bert": {}, "Roberta": {"type_vocab_size": 1}}


def lst(**params: Any) -> LST:
    return LST(LST.Params(**{"k": 4, **params}))


@functools.cache
def zoo(family: str) -> Path:
    """The folder of a small random model of a family, all weights distinct, norms included."""
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **(DECODERS | ENCODERS)[family], "bos_token_id": 1, "eos_token_id": 2}
    )
    kind = f"{family}ForCausalLM" if family in DECODERS else f"{family}Model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.3)
            if parameter.dim() == 1:
                parameter.data += 1.0
    folder = Path(_HOME.name) / family
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The plain model, in eval mode: a language model or a classifier with three classes."""
    if any(f"{family}For" in (folder / "config.json").read_text() for family in DECODERS):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(5)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, dtype=torch.float32
    ).eval()


def attached(folder: Path, *, seed: int = 3, **params: Any) -> Attached:
    model = load(folder)
    task = "causal_lm" if hasattr(model, "lm_head") else "classify"
    facts = facts_for(model_facts(f"folder:{folder}", task=task), task)
    return Attached(model, lst(**params), facts, seed=seed)


def batches_for(one: Attached, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    return random_batches(320, classes=0 if hasattr(one.model, "lm_head") else 3, seed=seed)


def ladder(one: Attached | nn.Module) -> Ladder:
    return ladder_of(base_of(one.model if isinstance(one, Attached) else one))


def wake(one: Attached, seed: int = 8) -> None:
    """Random numbers where the side network starts from nothing, so that everything shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ladder(one).parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def heard_states(folder: Path, ids: Tensor) -> list[Tensor]:
    """h_0 … h_N of the plain model, the last one before its final norm, heard with our own hooks."""
    model = load(folder)
    body = base_of(model)
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer
    states: list[Tensor] = []
    layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    return states


def described(folder: Path) -> ModelFacts:
    return model_facts(f"folder:{folder}", task="causal_lm" if folder.name in DECODERS else "classify")
