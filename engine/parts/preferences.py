"""Objectives over pairs of answers: reference log-probabilities taken once, losses of the difference, numbers for the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.tasks.base import Task
from engine.tasks.batching import measuring
from engine.train.parts import Loss, Objective


class PairObjective(Objective):
    """A loss of the log-probabilities of better and worse answers. `task` is engine.tasks.preference.Preference."""

    spares_frozen_blocks = True

    def __init__(self, task: Task) -> None:
        self.task: Any = task
        self._seen: dict[str, float] = {}

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(batch["num_samples"])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator) -> Loss:
        sums, counts = self.task.sequence_scores(model, batch)  # [2B], [2B]
        losses, margin = self.losses(sums, counts, batch)  # [B], [B]
        self._note("pairs", len(margin))
        self._note("reward_margin", float(margin.detach().sum()))
        self._note("reward_accuracy", float((margin.detach() > 0).sum()))
        better, worse = (sums / counts).detach().chunk(2)
        self._note("logps_chosen", float(better.sum()))
        self._note("logps_rejected", float(worse.sum()))
        return Loss(total=losses.sum(), weight=float(len(margin)))

    def losses(self, sums: Tensor, counts: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss [B], reward margin [B]) from the summed log-probabilities [2 B] and token counts [2 B]."""
        raise NotImplementedError

    def numbers(self) -> Mapping[str, float]:
        seen, self._seen = self._seen, {}
        pairs = seen.pop("pairs", 0.0)
        return {name: value / pairs for name, value in seen.items()} if pairs else {}

    def _note(self, name: str, value: float) -> None:
        self._seen[name] = self._seen.get(name, 0.0) + value


class Referenced(PairObjective):
    """Compares with the model as it was: its log-probabilities of every training pair are taken before the first step and kept with the run.

    No second model is ever in memory; the price is one pass over the data without gradient.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.reference = torch.empty(0, 2)  # [rows of the data, (better, worse)], NaN where no pair was

    @torch.no_grad()
    def begin(self, run: Any) -> None:
        reference = torch.full((len(run.encoded.rows), 2), torch.nan)
        with measuring(run.model), run.autocast():
            for start in range(0, len(run.encoded.train), 8):
                examples = run.encoded.train[start : start + 8]
                batch = run.task.collate(examples, run.tokenizer, run.recipe)
                sums, _ = self.task.sequence_scores(
                    run.model, {key: value.to(run.device) for key, value in batch.items()}
                )
                reference[batch["source"]] = torch.stack(sums.float().cpu().chunk(2), 1)
        self.reference = reference

    def of(self, batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The reference's summed log-probabilities [2 B] of a micro-batch."""
        return self.reference[batch["source"].cpu()].to(device).T.reshape(-1)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference = state["reference"]


def dpo_losses(margin: Tensor, *, beta: float, kind: str, label_smoothing: float) -> Tensor:
    """The loss [B] of a margin [B], the difference of log-ratios (better - worse).

    sigmoid: -log σ(β m), with the share `label_smoothing` of the pairs taken for swapped (Rafailov et al. 2023, Eq. 7; conservative DPO);
    hinge: max(0, 1 - β m) (SLiC); ipo: (m - 1 / 2β)² (Azar et al. 2023, Eq. 17).
    """
    if kind == "hinge":
        return functional.relu(1 - beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    right, swapped = functional.logsigmoid(beta * margin), functional.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * swapped
