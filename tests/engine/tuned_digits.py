"""Self-tuning on handwritten digits: a small network, few images with wrong labels among them, and the real parts of the method around it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from engine.core.recipe import parse_recipe
from engine.methods.cross_entropy import LikelyAnswer
from engine.parts.best_response import Knob, Knobs
from engine.parts.ranges import Range
from engine.parts.self_tuning import DROPOUT, BestResponse, SelfTuning, SetAside, Trajectory
from engine.tasks.base import Encoded, Example, Task
from engine.tasks.batching import sliced
from engine.train.clock import Clock
from engine.train.parts import PartContext, seeded
from engine.train.trainables import collect

LAYERS = ("0", "2", "4")
NUM_TRAIN, SHARE, WRONG, BATCH = (
    600,
    0.5,
    0.2,
    50,
)  # 300 images teach, 300 set the dropout; a fifth of all labels is wrong


class Digits(Task):
    """Images as rows of 64 pixels."""

    name = "classify"

    def batches(
        self, examples: Sequence[Example], order: Sequence[int], batch_size: int, recipe: Any
    ) -> list[list[int]]:
        return sliced(order, batch_size)

    def collate(self, examples: Sequence[Example], tokenizer: Any, recipe: Any) -> dict[str, Tensor]:
        count = torch.tensor(len(examples))
        pixels = torch.tensor([example.input_ids for example in examples], dtype=torch.float32) / 16
        labels = torch.tensor([example.labels[0] for example in examples])
        return {"pixels": pixels, "labels": labels, "num_tokens": count, "num_samples": count}

    def forward_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch["pixels"]), batch["labels"]


@dataclass
class Result:
    """What a run led to."""

    rates: list[float]  # of dropout, one a step
    test_loss: float  # on labels with the same share of wrong ones
    clean_loss: float  # on the true labels
    test_accuracy: float  # on the true labels
    passes: int
    schedule: Any


def network(seed: int) -> nn.Sequential:
    """64-128-128-10."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def data(seed: int) -> tuple[Encoded, Tensor, Tensor, Tensor]:
    """Training examples; test images with labels as noisy as those of the examples, and with true ones."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    wrong = random.random(len(labels)) < WRONG
    noisy = np.where(wrong, random.integers(0, 10, len(labels)), labels)
    examples = [Example(images[i].astype(int).tolist(), [int(noisy[i])], int(i)) for i in train]
    return (
        Encoded(train=examples, holdout=[], holdout_rows=[]),
        torch.tensor(images[test], dtype=torch.float32) / 16,
        torch.tensor(noisy[test]),
        torch.tensor(labels[test]),
    )


def context(seed: int) -> PartContext:
    recipe = parse_recipe(
        {
            "task": "classify",
            "model": {"source": "folder:/none"},
            "data": {"source": "file:/none"},
            "settings": {"seed": seed, "batch_size": BATCH, "learning_rate": 1.0},
        }
    )
    return PartContext(recipe=recipe, facts=None, task=Digits(), slug="stn", index=0)  # type: ignore[arg-type]


class Bench:
    """The parts of the method on a small network, and what a run would give them."""

    def __init__(
        self,
        seed: int,
        *,
        start: float,
        steps: int = 100,
        tune: bool = True,
        weight_rate: float = 1e-2,
        double: bool = False,
        **changes: Any,
    ) -> None:
        self.seed = seed
        self.encoded, self.images, self.labels, self.truth = data(seed)
        self.ctx, self.model = context(seed), network(seed)
        self.knobs = Knobs([Knob(DROPOUT, Range(0.0, 0.9), start)], 0.5)
        self.layers = BestResponse(self.ctx, list(LAYERS), self.knobs, head=False, pull_to_start=False, copy="random")
        self.aside = SetAside(SHARE, seed)
        if double:
            self.model.double()
            self.knobs.raw = self.knobs.raw.detach().double().requires_grad_()
            self.knobs.scale = self.knobs.scale.detach().double().requires_grad_()
        settings: dict[str, Any] = {"train_steps": 2, "val_steps": 1, "warmup": 100.0, "rate": 1e-2, "scale_rate": 1e-2, "entropy": 1e-3,
                                    "tune_scales": True, "tune": tune, "random_words": False, **changes}  # fmt: skip
        self.step = SelfTuning(self.ctx, self.layers, self.aside, **settings)
        self.aside.survey(self.encoded)
        self.layers.attach(self.model)
        generator = seeded(seed, "response")
        for layer in self.layers.wrapped.values():  # as in the paper, for a network that starts from nothing
            if double:
                layer.double()
            with torch.no_grad():
                layer.response.copy_(torch.randn(layer.response.shape, generator=generator) * 0.01)
        trainables = collect(self.model, [self.layers], ()) if not double else self.layers.wrapped["0"].own().values()
        per_epoch = len(sliced(self.aside.rows(range(NUM_TRAIN), 0), BATCH))
        self.clock = Clock(total_steps=steps, steps_per_epoch=per_epoch, num_samples=NUM_TRAIN)
        self.run: Any = SimpleNamespace(
            model=self.model, trainables=trainables, objective=LikelyAnswer(self.ctx.task, 0.0), terms=[], rules=[], tokenizer=None,
            encoded=self.encoded, clock=self.clock, optimizer=torch.optim.SGD(list(trainables), lr=weight_rate, momentum=0.9),
            schedule=SimpleNamespace(factor=lambda clock: 1.0), settings=self.ctx.recipe.settings.model_copy(update={"learning_rate": weight_rate}),
            recipe=self.ctx.recipe, task=self.ctx.task, device=torch.device("cpu"), rng=torch.Generator(), autocast=contextlib.nullcontext,
            slots=SimpleNamespace(policies=[self.aside]),
        )  # fmt: skip

    def train(self, schedule: Trajectory | None = None) -> Result:
        """Run to the end; with a schedule the dropout follows it."""
        torch.manual_seed(self.seed)
        self.model.train()
        rates: list[float] = []
        batches: list[list[int]] = []
        epoch = 0
        while self.clock.step < self.clock.total_steps:
            if not batches:
                order = torch.randperm(NUM_TRAIN, generator=seeded(self.seed, "order", str(epoch))).tolist()
                batches, epoch = sliced(self.aside.rows(order, epoch), BATCH), epoch + 1
            if schedule is not None:
                with torch.no_grad():
                    self.knobs.raw.fill_(self.knobs.knobs[0].range.raw(schedule.at(self.clock.step)[0]))
            examples = [self.encoded.train[index] for index in batches.pop(0)]
            report = self.step.update(self.run, [self.ctx.task.collate(examples, None, self.ctx.recipe)])
            self.clock.step, self.clock.samples, self.clock.tokens = report.step, report.samples, report.tokens
            rates.append(float(report.extra[DROPOUT]))
        self.model.eval()
        with torch.no_grad():
            logits = self.model(self.images)
        loss, clean = (float(nn.functional.cross_entropy(logits, labels)) for labels in (self.labels, self.truth))
        accuracy = float((logits.argmax(1) == self.truth).float().mean())
        return Result(rates, loss, clean, accuracy, self.step.passes, self.layers.schedule)
