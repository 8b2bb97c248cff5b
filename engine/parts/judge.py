"""A loaded model whose weights are exchanged again and again and that is scored on a few rows, for searches over merged or pruned weights.

The rows are those that the transformation was given. They have to be other rows than those of the final test: what a search has seen is no test any more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.errors import bad_input
from engine.io.models import base_of

Batch = Mapping[str, Tensor]
TOP = 5  # logits of the fine-tuned model that are compared


class Judge:
    """One model in memory and a few batches; `put` exchanges weights, `loss` and `outputs` say what that does.

    ctx: an engine.ops.work.WorkContext whose recipe has data.
    """

    def __init__(self, ctx: Any, index: int, *, num: int, length: int) -> None:
        self.task = ctx.task
        self.batches: Sequence[Batch] = ctx.calibration(num, length)
        self.model: nn.Module = ctx.load_model(index).eval()
        self._places = places_of(self.model)
        if not self.batches:
            raise bad_input(
                "data",
                "There are no rows to measure with.",
                "The search compares many versions of the model on examples.",
                "Choose data with at least a few rows.",
                "no_rows",
            )

    @torch.no_grad()
    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Exchange weights by the names of the model's file; names that the loaded model does not have are passed over."""
        for name, value in weights:
            place = self._places.get(name)
            if place is not None:
                place.copy_(value.reshape(place.shape))

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss over all supervised places of all batches."""
        total, count = 0.0, 0
        for batch in self.batches:
            logits, labels = self.task.forward_logits(self.model, batch)
            total += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            count += labels.numel()
        return total / max(1, count)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """What the model says, one tensor a batch: last hidden states of an encoder [n, hidden], logits of anything else [n, classes]."""
        return [self._output(batch) for batch in self.batches]

    def _output(self, batch: Batch) -> Tensor:
        body = base_of(self.model)
        if "encoder" in self.task.model_kinds and body is not self.model and "attention_mask" in batch:
            known = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
            hidden: Tensor = body(**known).last_hidden_state  # [b, t, hidden]
            return hidden[batch["attention_mask"].bool()]
        logits: Tensor = self.task.forward_logits(self.model, batch)[0]
        return logits

    def distance(self, wanted: Sequence[Tensor]) -> float:
        """How far the outputs are from `wanted`: mean |difference| of hidden states, or mean squared difference at the largest logits of `wanted`."""
        total, count = 0.0, 0
        for goal, batch in zip(wanted, self.batches, strict=True):
            with torch.no_grad():
                now = self._output(batch)
            if "encoder" in self.task.model_kinds:
                total += float((now - goal).abs().sum())
                count += goal.numel()
            else:
                top = goal.topk(min(TOP, goal.shape[-1]), dim=-1).indices
                total += float((now.gather(-1, top) - goal.gather(-1, top)).square().sum())
                count += top.numel()
        return total / max(1, count)

    @torch.no_grad()
    def mean_inputs(self) -> dict[str, Tensor]:
        """Mean input of every linear layer by the name of its weight in the file: [in]."""
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        handles = []

        def watch(key: int) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
                sums[key] = sums.get(key, 0) + x.sum(0)
                counts[key] = counts.get(key, 0) + x.shape[0]

            return hook

        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(watch(id(module.weight))))
        try:
            for batch in self.batches:
                self.task.forward_logits(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        means = {key: (total / counts[key]).float().cpu() for key, total in sums.items()}
        return {name: means[id(place)] for name, place in self._places.items() if id(place) in means}


def places_of(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights of a file go in a loaded model, with and without the prefix of its body."""
    places: dict[str, Tensor] = dict(model.named_parameters())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, value in list(places.items()):
        places.setdefault(name.removeprefix(prefix), value)
    return places


def evolve(
    score: Callable[[list[float]], float],
    start: Sequence[float],
    *,
    low: float,
    high: float,
    budget: int,
    seed: int,
) -> tuple[list[float], float, list[float]]:
    """Minimise a score with a (1+1) evolution strategy and the one-fifth rule: (best point, its score, best score after each evaluation).

    The start is evaluated first, so the result is never worse than it on the rows that were looked at.
    """
    draw = random.Random(seed)
    best = [min(high, max(low, value)) for value in start]
    least = score(best)
    path, width = [least], (high - low) / 4
    for _ in range(budget - 1):
        trial = [min(high, max(low, value + draw.gauss(0.0, width))) for value in best]
        found = score(trial)
        if found < least:
            best, least, width = trial, found, min((high - low) / 2, width * 1.5)
        else:
            width = max((high - low) / 200, width * 1.5**-0.25)
        path.append(least)
    return best, least, path
