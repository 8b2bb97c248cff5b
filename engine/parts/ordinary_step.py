"""The ordinary training step over the micro-batches of one optimizer batch; update rules that do more build on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.parts.optimizers import gradient_norm
from engine.parts.signals import NoiseMeter
from engine.train.parts import Loss, StepReport, UpdateRule
from engine.train.trainables import set_rates

if TYPE_CHECKING:
    from engine.train.run import Run


CUT_EVERY, FIRST_CUT = (
    32,
    8,
)  # steps; a cut step took 1.28 of one (LoRA on MiniLM, 16 short texts), so all together below one percent


class OrdinaryStep(UpdateRule):
    """Loss and terms of every micro-batch → backward → norm → gradient rules → schedule → optimizer.

    A step of more than one micro-batch also tells the norm of the first, from which chance and signal are told apart. Where a step is one
    micro-batch, every 32nd is cut in two (`cuts`, which `Run.next_batches` asks): the same step up to rounding.
    """

    spares_frozen_blocks = True

    def __init__(self) -> None:
        self.noise_meter = NoiseMeter()

    def cuts(self, step: int) -> bool:
        return step % CUT_EVERY == FIRST_CUT

    def numbers(self) -> Mapping[str, float]:
        return self.noise_meter.numbers()

    def state_dict(self) -> dict[str, Any]:
        return self.noise_meter.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.noise_meter.load_state_dict(state)

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
        if extra:
            self.noise_meter.take(norm, **extra)
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
