"""A prepared run with rollouts, and a task whose marks a test decides, for tests of reinforcement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.control import Control
from engine.core.events import EventLog
from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.train import prepare
from engine.tasks.base import Row
from engine.tasks.verifiable import Verifiable
from engine.train.run import Run
from tests.engine.tiny import Tiny


class Marked(Verifiable):
    """The real task, with marks from a function (row, text, hinted) -> 0 or 1."""

    def __init__(self, mark: Callable[[Row, str, bool], float], *, silent_hints: bool = False) -> None:
        self.mark, self.silent_hints, self.hinted = mark, silent_hints, False
        self.asked: list[tuple[str, bool]] = []

    def prompt_ids(self, row: Row, tokenizer: Any, hint: str = "") -> list[int]:
        self.hinted = bool(hint)
        self.asked.append((row["question"], self.hinted))
        return super().prompt_ids(row, tokenizer, "" if self.silent_hints else hint)

    def reward(self, row: Row, text: str) -> float:
        return float(self.mark(row, text, self.hinted))


def rolling(
    tiny: Tiny, folder: Path, slug: str, params: dict[str, Any], mark: Callable[..., float] | None = None,
    others: Sequence[tuple[str, dict[str, Any]]] = (("full-finetuning", {}),), silent_hints: bool = False, **settings: Any,
) -> Run:  # fmt: skip
    """A run that is ready for its first step."""
    plan = {"max_steps": 4, "epochs": 50, "batch_size": 4, "max_length": 48, "learning_rate": 1e-3, "evaluations": 1, "precision": "fp32",
            "seed": 5, **settings}  # fmt: skip
    methods = [
        *({"slug": name, "params": more} for name, more in others),
        {"slug": slug, "params": {"k": 4, "max_new_tokens": 6, **params}},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    recipe = parse_recipe({**tiny.inputs("verifiable"), "methods": methods, "settings": plan})
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    if mark is not None:
        run.task = Marked(mark, silent_hints=silent_hints)
    return run


def gathered(run: Run, number: int = 4) -> list[dict[str, Tensor]]:
    """The micro-batches that the policy makes of the first questions."""
    made = run.slots.policies[0].gather(run, run.encoded.train[:number])
    assert made
    return made


def gradients(run: Run, micro: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the objective over a whole step."""
    whole = max(1.0, sum(run.objective.weight(batch) for batch in micro))
    for batch in micro:
        (run.objective.loss(run.model, batch, run.rng).total / whole).backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in run.trainables.items()}
    for parameter in run.trainables:
        parameter.grad = None
    return found


@torch.no_grad()
def dense_logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """log p of every answer token by one plain forward pass of one row."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + place, token] for place, token in enumerate(answer)])


def some_right(row: Row, text: str, hinted: bool) -> float:
    """Marks that depend on the text alone: about every third answer is right."""
    return float(sum(map(ord, text)) % 3 == 0)
