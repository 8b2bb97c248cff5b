"""Adapter files in the peft layout, and the fresh modules (a new classifier) that travel with every adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.facts import ModelFacts
from engine.parts.targets import short_names

PEFT_PREFIX = "base_model.model."
FRESH_PREFIX = "fresh."
_TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM"}


def lora_config(
    model: nn.Module, facts: ModelFacts, layers: Iterable[str], fresh: tuple[str, ...], **settings: Any
) -> dict[str, Any]:
    """The content of adapter_config.json, exactly as peft writes it; `settings` are fields of peft.LoraConfig."""
    from peft import LoraConfig  # seconds to import, and only needed here

    hub, _, revision = facts.source.removeprefix("hub:").partition("@")
    kind = type(model).__name__
    config = LoraConfig(
        task_type=next((value for suffix, value in _TASK_TYPES.items() if kind.endswith(suffix)), None),
        base_model_name_or_path=hub if facts.source.startswith("hub:") else None,
        revision=revision or None,
        target_modules=short_names(layers, model),
        modules_to_save=list(fresh) or None,
        bias="none",
        inference_mode=True,
        **settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        content: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    if float(content["lora_alpha"]).is_integer():
        content["lora_alpha"] = int(content["lora_alpha"])  # as peft writes it; some readers insist
    return content


def base_name(facts: ModelFacts) -> str | None:
    """How an adapter file of ours names its base; None for a folder, whose place means nothing on another machine."""
    return None if facts.source.startswith("folder:") else facts.source


def fresh_tensors(model: nn.Module, fresh: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameters and buffers of the fresh modules by their names in the model, in fp32."""
    return {
        f"{module}.{name}": tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for module in fresh
        for name, tensor in model.get_submodule(module).state_dict().items()
    }


def load_fresh(model: nn.Module, tensors: Mapping[str, Tensor], fresh: tuple[str, ...], prefix: str) -> None:
    """Put saved tensors of the fresh modules back; `prefix` is what the file writes before their names."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if any(name.startswith(module + ".") for module in fresh):
                tensor.copy_(tensors[prefix + name])
