"""Attaching one parametrization to a model without a run around it, and plain training steps, for tests of methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.core.control import write_json
from engine.core.facts import DataFacts, Facts, MachineFacts, ModelFacts
from engine.core.method import TrainMethod
from engine.core.recipe import parse_recipe
from engine.tasks.base import Task
from engine.train.parts import Parametrization, PartContext, Payload
from engine.train.trainables import Trainables, collect

LENGTH = 24


class Topics(Task):
    """The part of a classification task that a parametrization asks for."""

    name = "classify"

    def fresh(self, model: nn.Module) -> tuple[str, ...]:
        return ("classifier",) if hasattr(model, "classifier") else ()

    def forward_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=batch["input_ids"]).logits
        if logits.dim() == 2:
            return logits, batch["labels"]
        places = batch["labels"][:, 1:] != -100
        return logits[:, :-1][places], batch["labels"][:, 1:][places]


class Attached:
    """A model with one parametrization on it."""

    def __init__(self, model: nn.Module, method: TrainMethod, facts: Facts, *, seed: int = 3) -> None:
        recipe = parse_recipe({"task": facts.task, "model": {"source": facts.model.source}, "data": {"source": "file:/none"},
                               "settings": {"seed": seed}})  # fmt: skip
        self.model, self.facts, self.task = model, facts, Topics()
        self.ctx = PartContext(recipe=recipe, facts=facts, task=self.task, slug=method.card.slug, index=0)
        self.part: Parametrization = method.parts(self.ctx)[0]
        self.part.attach(model)
        self.trainables: Trainables = collect(model, [self.part], self.task.fresh(model))
        self.part.sync(model)

    def train(self, batches: Iterator[dict[str, Tensor]], steps: int, learning_rate: float = 1e-2) -> list[float]:
        """Plain AdamW steps; returns the losses."""
        optimizer = torch.optim.AdamW(list(self.trainables), lr=learning_rate, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            loss = self.loss(next(batches))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.part.sync(self.model)
            losses.append(loss.item())
        return losses

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits, labels = self.task.forward_logits(self.model, batch)
        return nn.functional.cross_entropy(logits, labels)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        return logits_of(self.model, batch)


@torch.no_grad()
def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The plain output of a model in eval mode."""
    training = model.training
    model.eval()
    out: Tensor = model(input_ids=batch["input_ids"]).logits
    model.train(training)
    return out


def facts_for(model: ModelFacts, task: str) -> Facts:
    """Facts around a model, for methods that look at no more than the model."""
    data = DataFacts(source="", path="", format="csv", shape="classification", num_rows=100, columns=(), mapping={})
    machine = MachineFacts(device="cpu", device_name="CPU", memory_bytes=8 << 30, num_threads=1, has_bf16=False)
    return Facts(task=task, model=model, data=data, machine=machine)


def random_batches(vocab_size: int, *, classes: int = 0, size: int = 4, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Endless random token batches, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(5, vocab_size, (size, LENGTH), generator=generator)
        labels = torch.randint(0, classes, (size,), generator=generator) if classes else ids
        yield {"input_ids": ids, "labels": labels}


def write_peft(payload: Payload, folder: Path) -> Path:
    """Write a peft payload as the two files that peft reads."""
    assert payload.layout == "peft"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", payload.config)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in payload.tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def parameter_copy(model: nn.Module) -> dict[str, Any]:
    """All parameters and buffers, cloned."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
