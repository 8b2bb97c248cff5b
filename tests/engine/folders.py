"""Plain dictionaries of tensors as model folders, for tests of transformations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.ops.transform import transform

Weights = Mapping[str, Tensor]


def write_model(folder: Path, weights: Weights, config: Mapping[str, Any] | None = None) -> Path:
    """A model folder with these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config or {"name": folder.name})), encoding="utf-8")
    return folder


def merged(home: Path, slug: str, models: Sequence[Weights], **params: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Apply a transformation to models given as dictionaries: (the new weights, the report)."""
    number = len(list(home.glob("out-*")))
    sources = [write_model(home / f"in-{number}-{place}", weights) for place, weights in enumerate(models)]
    record = transform(slug, params, sources, home / f"out-{number}")
    return load_file(home / f"out-{number}" / "model.safetensors"), record["report"]


def random_family(
    num_tuned: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.05
) -> list[dict[str, Tensor]]:
    """A base and fine-tuned models around it: two layers, a word table, a norm, and a counter that is no weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (30, 8), "layers.0.q.weight": (8, 8), "layers.0.up.weight": (16, 8), "layers.0.norm.weight": (8,),
        "layers.1.q.weight": (8, 8), "layers.1.up.weight": (16, 8), "head.weight": (5, 8),
    }  # fmt: skip
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    models = [base]
    for _ in range(num_tuned):
        tuned = {
            name: (value.float() + spread * torch.randn(value.shape, generator=generator)).to(dtype)
            for name, value in base.items()
        }
        models.append(tuned)
    for place, model in enumerate(models):
        model["position_ids"] = torch.arange(7) + 100 * place
    return models


def flat(weights: Weights, like: Weights) -> Tensor:
    """All float tensors in the order of their names, as one fp64 vector."""
    return torch.cat([weights[name].double().reshape(-1) for name in sorted(like) if like[name].is_floating_point()])
