"""A model without its weights: kind, names and shapes, from the configuration and the headers of the weight files."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

from engine.io.headers import TensorInfo
from engine.io.sources import model_fault


def kind_of(config: Any) -> str:
    """Whether a model reads ("encoder"), writes ("decoder") or does both in turn ("encoder-decoder")."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    masked, causal = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type in causal and (config.model_type not in masked or getattr(config, "is_decoder", False)):
        return "decoder"
    return "encoder"


def skeleton_of(config: Any, auto_class: str) -> Any:
    """The model without memory for its weights: only names and shapes."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise model_fault(f"A {config.model_type} model cannot be used for this goal.", f"There is no {auto_class} for it.",
                          "Choose another model, or another goal.", "wrong_model_kind") from error  # fmt: skip


def names_and_shapes(
    skeleton: Any, header: dict[str, TensorInfo]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    """Parameters that the files hold, and the ordinary linear layers among them, without output layers and task heads."""
    prefix = f"{skeleton.base_model_prefix}."
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    stored = {name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in header}
    known = {
        name for name in shapes if name in stored or name.removeprefix(prefix) in stored or prefix + name in stored
    }
    if len(known) * 2 < len(shapes):  # transformers renames this family's tensors while it loads them
        known = {name for name in shapes if name.startswith(prefix)}
    output = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear and module is not output and name.startswith(prefix) and f"{name}.weight" in known
    }
    inside = {name for name in known if name.startswith(prefix)}
    # A classifier belongs to its labels, so it is never part of the base; an output layer over the vocabulary is.
    heads = known - inside if output is not None else set()
    return {name: shapes[name] for name in shapes if name in inside | heads}, linears


def max_positions(config: Any, skeleton: Any) -> int:
    """How many tokens the model reads at once."""
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
