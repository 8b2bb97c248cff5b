"""The ordinary training step over the micro-batches of one optimizer batch; update rules that do more build on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.parts.optimizers import gradient_norm
from engine.train.parts import Loss, StepReport, UpdateRule
from engine.train.trainables import set_rates

if TYPE_CHECKING:
    from engine.train.run import Run


class OrdinaryStep(UpdateRule):
    """Loss and terms of every micro-batch → backward → norm → gradient rules → schedule → optimizer."""

    spares_frozen_blocks = True

    def piece(
        self, run: Run, batch: dict[str, Tensor], *, whole: float, share: float, part: float
    ) -> tuple[Loss, Tensor]:
        """The loss of one micro-batch and what it adds to the loss of the whole batch.

        whole: supervised items of the optimizer batch; share: those of this micro-batch / whole; part: its examples / all examples.
        """
        loss = run.objective.loss(run.model, batch, run.rng)
        total = loss.total / whole
        for term in run.terms:
            total = total + term.term(run.model, batch, loss, share)
        return loss, total

    def update(self, run: Run, micro: list[dict[str, Tensor]]) -> StepReport:
        clock = run.clock
        # Counts are read before the device gets work to do, so that reading them waits for nothing.
        weights = [run.objective.weight(batch) for batch in micro]
        whole = max(1.0, sum(weights))
        sizes = [int(batch["num_samples"]) for batch in micro]
        samples = sum(sizes)
        tokens = sum(int(batch["num_tokens"]) for batch in micro)

        logged = torch.zeros((), device=run.device)
        extra: dict[str, Any] = {}
        for batch, weight, size in zip(micro, weights, sizes, strict=True):
            with run.autocast():
                loss, total = self.piece(run, batch, whole=whole, share=weight / whole, part=size / max(1, samples))
            total.backward()
            logged += loss.total.detach() / whole
            if len(micro) > 1 and not extra and weight > 0:
                # The first piece beside the whole tells noise from signal; its gradient is that of its own mean loss.
                piece = gradient_norm(run.trainables) * (whole / weight)
                extra = {"micro_norm": piece, "micro_size": size, "batch_size": samples}

        norm = gradient_norm(run.trainables)
        for rule in run.rules:
            extra.update(rule.apply(run.trainables, norm))
        rate = set_rates(run.optimizer, run.schedule, clock, run.settings.learning_rate or 0.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return StepReport(
            step=clock.step + 1,
            loss=logged,
            grad_norm=norm,
            learning_rate=rate,
            samples=clock.samples + samples,
            tokens=clock.tokens + tokens,
            epoch=(clock.step + 1) / max(1, clock.steps_per_epoch),
            weight=whole,
            extra=extra,
        )
