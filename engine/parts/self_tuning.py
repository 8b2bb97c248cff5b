"""Tuning regularisers while the weights learn: best-response layers in a model, examples set aside, and the step that alternates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.core.errors import EngineError, Fault, bad_input
from engine.core.slots import Phase
from engine.parts.adapters import FRESH_PREFIX, fresh_tensors, load_fresh
from engine.parts.best_response import Copy, HyperLinear, Knobs, Play
from engine.parts.ordinary_step import OrdinaryStep
from engine.parts.targets import linear, replace
from engine.tasks.base import Encoded
from engine.tasks.batching import is_packed, split_rows, unpacked
from engine.train.parts import DataPolicy, Loss, Parametrization, PartContext, Payload, StepReport

if TYPE_CHECKING:
    from engine.train.run import Run
    from engine.train.trainables import Trainables

DROPOUT, WEIGHT_DECAY, WORDS, STRETCH = "dropout", "weight_decay", "words_hidden", "stretch_hidden"
_REACH, _SLOWEST, _QUICKEST = (
    6.0,
    3e-3,
    0.1,
)  # how far raw numbers should be able to travel in a run; bounds of the rate


class BestResponse(Parametrization):
    """Target layers and the linear layers of a fresh head get a best response; the rest of the model stays frozen."""

    def __init__(
        self, ctx: PartContext, layers: Sequence[str], knobs: Knobs, *, head: bool, pull_to_start: bool, copy: Copy
    ) -> None:
        self.ctx, self.named, self.knobs = ctx, list(layers), knobs
        self.head, self.pull_to_start, self.copy = head, pull_to_start, copy
        self.wrapped: dict[str, HyperLinear] = {}
        self.schedule = Trajectory(knobs)

    def attach(self, model: nn.Module) -> None:
        fresh = self.ctx.task.fresh(model)
        heads = [name for name in linears_inside(model, fresh) if name not in self.named] if self.head else []
        if not self.named and not heads:
            raise bad_input("methods", "No layer would learn its response.", "No target layer is named and there is no new classifier to wrap.",
                            "Name target layers.", "no_such_layer")  # fmt: skip
        for name in [*self.named, *heads]:
            plain = linear(model, name)
            self.knobs.to(plain.weight.device)
            own = self.knobs.place(f"{DROPOUT}/{name}")
            self.wrapped[name] = HyperLinear(
                plain,
                self.knobs,
                dropout=own if own is not None else self.knobs.place(DROPOUT),
                pull=self.pull_to_start and name in self.named,  # a new classifier has no start worth keeping
                copy=self.copy,
                generator=self.ctx.generator(f"copy/{name}"),
            )
            replace(model, name, self.wrapped[name])

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{short}": parameter
            for name, layer in self.wrapped.items()
            for short, parameter in layer.own().items()
        }

    def penalty(self, rows: Tensor) -> Tensor:
        """Half the squared distance that weight decay pulls on, over all layers, [B]."""
        return torch.stack([layer.half_square(rows) for layer in self.wrapped.values()]).sum(0)

    def merge(self, model: nn.Module) -> bool:
        for name, layer in self.wrapped.items():
            replace(model, name, layer.plain())
        return True

    def export(self, model: nn.Module) -> Payload:
        fresh = self.ctx.task.fresh(model)
        tensors = {FRESH_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()}
        for name in self.named:
            tensors |= {f"{name}.{short}": p.detach().clone() for short, p in self.wrapped[name].own().items()}
        tensors |= {f"knobs.{key}": tensor for key, tensor in self.knobs.state().items()}
        tensors |= self.schedule.tensors()
        spread, current = self.knobs.spread().tolist(), self.knobs.current().tolist()
        config = {
            "method": self.ctx.slug,
            "layers": list(self.wrapped),
            "base_model": self.ctx.facts.model.source,
            "fresh": list(fresh),
            "hyperparameters": [
                {
                    "name": knob.name,
                    "low": knob.range.low,
                    "high": knob.range.high,
                    "whole": knob.range.whole,
                    "value": value,
                    "spread": width,
                }
                for knob, value, width in zip(self.knobs.knobs, current, spread, strict=True)
            ],
            "meaning": "with c = response @ knobs.raw, split into cw and cb: weight + diag(cw) hyper_weight, bias + cb * hyper_bias. "
            "schedule.values[i] are the hyperparameters from step schedule.steps[i] on, in the order of 'hyperparameters'.",
        }
        return Payload(layout="bonsai", config=config, tensors=tensors)

    @torch.no_grad()
    def restore(self, model: nn.Module, payload: Payload) -> None:
        for name in self.named:
            for short, parameter in self.wrapped[name].own().items():
                parameter.copy_(payload.tensors[f"{name}.{short}"])
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)
        self.knobs.load({key: payload.tensors[f"knobs.{key}"] for key in ("raw", "scale")})
        self.schedule.load(payload.tensors)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.knobs.state())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.knobs.load(state)


class Trajectory:
    """The values of the hyperparameters over time: a schedule that an ordinary run can follow."""

    def __init__(self, knobs: Knobs) -> None:
        self.steps, self.rows = [0], [knobs.current().tolist()]

    def add(self, step: int, values: Tensor) -> None:
        """From `step` on these values [n] hold."""
        self.steps.append(step)
        self.rows.append(values.tolist())

    def at(self, step: int) -> list[float]:
        """The values in force after `step` steps."""
        return next(row for start, row in zip(reversed(self.steps), reversed(self.rows), strict=True) if start <= step)

    def tensors(self) -> dict[str, Tensor]:
        return {"schedule.steps": torch.tensor(self.steps), "schedule.values": torch.tensor(self.rows)}  # [k], [k, n]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.steps, self.rows = tensors["schedule.steps"].tolist(), tensors["schedule.values"].tolist()


class SetAside(DataPolicy):
    """Takes a share of the training examples out of training: they set the hyperparameters. The held-out examples stay untouched."""

    phase = Phase.SELECT

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.aside: list[int] = []

    def survey(self, encoded: Encoded) -> None:
        """Split within each class, repeated texts on one side; a pure function of the examples and the seed."""
        examples = encoded.train
        strata = [example.labels[0] if len(example.labels) == 1 else 0 for example in examples]
        _, self.aside = split_rows([tuple(example.input_ids) for example in examples], strata, self.share, self.seed)
        self._held = frozenset(self.aside)
        if not self.aside or len(self.aside) == len(examples):
            raise bad_input("data", f"{len(examples):,} training examples cannot be split into two parts.",
                            "Some examples teach the weights and others set the regularisers, and repeated texts stay together.",
                            "Give more, different examples.", "too_few_rows")  # fmt: skip

    def rows(self, indices: Sequence[int], epoch: int) -> Sequence[int]:
        return [index for index in indices if index not in self._held]


class SelfTuning(OrdinaryStep):
    """A training step with perturbed hyperparameters, one row per example; after every few of them, steps of the hyperparameters themselves.

    A step of the loop is one training step; the steps of the hyperparameters that follow it happen inside the same update.
    """

    spares_frozen_blocks = False  # its perturbations act in every layer

    def __init__(
        self,
        ctx: PartContext,
        layers: BestResponse,
        aside: SetAside,
        *,
        train_steps: int,
        val_steps: int,
        warmup: float,
        rate: float | None,
        scale_rate: float | None,
        entropy: float,
        tune_scales: bool,
        tune: bool,
        random_words: bool,
    ) -> None:
        super().__init__()
        self.ctx, self.layers, self.knobs, self.aside = ctx, layers, layers.knobs, aside
        self.train_steps, self.val_steps, self.warmup, self.entropy = train_steps, val_steps, warmup, entropy
        self.rate, self.scale_rate, self.tune_scales, self.tune, self.random_words = (
            rate,
            scale_rate,
            tune_scales,
            tune,
            random_words,
        )
        self.noise = ctx.generator("noise")
        self.optimizer = torch.optim.Adam([{"params": [self.knobs.raw]}, {"params": [self.knobs.scale]}], lr=0.0)
        self.seen = 0  # validation batches so far
        self.passes = 0  # forward and backward passes so far
        self._order: list[list[int]] = []
        self._round = -1

    def cuts(self, step: int) -> bool:
        """Never: a step draws its perturbations batch by batch, so halves would draw others."""
        return False

    def begin(self, run: Run) -> None:
        """Say what was set aside; refuse policies whose batches the set-aside examples cannot become."""
        for policy in run.slots.policies:
            if type(policy).gather is not DataPolicy.gather:
                raise bad_input(
                    "methods",
                    "Another method makes its own batches.",
                    "Examples that were set aside must be read like all others, and such batches cannot be made from them.",
                    "Use the ordinary step with that method.",
                    "makes_batches",
                )
        count, every = len(self.aside.aside), len(run.encoded.train)
        message = (
            f"{count:,} of {every:,} training examples are set aside: they set the regularisers and teach no weight."
        )
        run.log.emit("log", {"level": "info", "message": message})

    # ── the training step ─────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, run: Run, micro: list[dict[str, Tensor]]) -> StepReport:
        pad = run.tokenizer.pad_token_id if run.tokenizer is not None else 0
        micro = [unpacked(batch, pad) if is_packed(batch) else batch for batch in micro]  # one row, one example
        try:
            report = super().update(run, micro)
        finally:
            self.knobs.play = None
        self.passes += len(micro)
        if self.tune and report.step > self.warmup * run.clock.steps_per_epoch and report.step % self.train_steps == 0:
            losses = [self.tune_once(run) for _ in range(self.val_steps)]
            report.extra["validation_loss"] = torch.stack(losses).mean()
            self.layers.schedule.add(report.step, self.knobs.current())
        for name, value, width in zip(
            self.knobs.names, self.knobs.current(), self.knobs.spread().detach(), strict=True
        ):
            report.extra |= {name: value, f"{name}_spread": width}
        report.extra["passes"] = self.passes
        return report

    def piece(
        self, run: Run, batch: dict[str, Tensor], *, whole: float, share: float, part: float
    ) -> tuple[Loss, Tensor]:
        examples, knobs = batch["labels"].shape[0], self.knobs
        with torch.no_grad():
            rows = knobs.draw(examples, self.noise) if self.tune else knobs.raw.expand(examples, -1)  # [B, n]
            values = knobs.values(rows)
        knobs.play = Play(rows, values)  # until after the backward pass, which may compute the forward pass again
        loss, total = super().piece(run, self.hidden(run, batch, values), whole=whole, share=share, part=part)
        decay = knobs.place(WEIGHT_DECAY)
        if decay is not None:
            total = total + part * (values[:, decay] * self.layers.penalty(rows)).mean()
        return loss, total

    def hidden(self, run: Run, batch: dict[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """The batch with some words of every example covered, as its own values [n] say."""
        words, stretch = self.knobs.place(WORDS), self.knobs.place(STRETCH)
        if words is None and stretch is None:
            return batch
        ids, real = batch["input_ids"], batch["attention_mask"].bool()  # [B, T]
        special = torch.tensor(run.tokenizer.all_special_ids, device=ids.device)
        covered = torch.zeros_like(real)
        if words is not None:
            drawn = torch.rand(ids.shape, generator=self.noise).to(ids.device)
            covered |= drawn < values[:, words, None]
        if stretch is not None:
            first = (
                torch.rand(len(ids), 1, generator=self.noise).to(ids.device) * real.sum(1, keepdim=True)
            ).long()  # [B, 1]
            place = torch.arange(ids.shape[1], device=ids.device)
            covered |= (place >= first) & (place < first + values[:, stretch, None])
        covered &= real & ~torch.isin(ids, special)
        return {**batch, "input_ids": torch.where(covered, self._filler(run, ids, real), ids)}

    def _filler(self, run: Run, ids: Tensor, real: Tensor) -> Tensor:
        """What stands in the place of a covered word: the mark for an unknown or masked one, or any word of the batch."""
        tokenizer = run.tokenizer
        mark = next((m for m in (tokenizer.mask_token_id, tokenizer.unk_token_id) if m is not None), None)
        if mark is not None and not self.random_words:
            return torch.full_like(ids, mark)
        pool = ids[real]
        return pool[torch.randint(len(pool), ids.shape, generator=self.noise).to(ids.device)]

    # ── the step of the hyperparameters ───────────────────────────────────────────────────────────────────────────────

    def tune_once(self, run: Run) -> Tensor:
        """One step of raw numbers and scales on examples that were set aside; every parameter of the network stands still."""
        knobs, batch = self.knobs, self._next_aside(run)
        loss, grads = self.hyper_gradients(run, batch)
        for group, rate in zip(self.optimizer.param_groups, self.rates(run), strict=True):
            group["lr"] = rate
        knobs.raw.grad, knobs.scale.grad = grads
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.passes += 1
        if not (knobs.raw.isfinite().all() and knobs.scale.isfinite().all()):
            raise EngineError(
                Fault(
                    where="methods",
                    what=f"The regularisers became infinite or not a number at step {run.clock.step + 1:,}.",
                    why="Their own learning rate is too high, or the weight of the entropy pushed the spread out of bounds.",
                    way_out="Start again with a tenth of their learning rate; the last good checkpoint is kept.",
                    code="not_finite",
                ),
                "diverged",
            )
        return loss

    def hyper_gradients(self, run: Run, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """The plain loss on a batch, and the gradients of (loss - entropy weight * entropy) for raw numbers and scales.

        No regulariser acts and no dropout: the gradient comes through the response of the layers alone.
        """
        knobs, examples = self.knobs, batch["labels"].shape[0]
        rows = knobs.draw(examples, self.noise) if self.tune_scales else knobs.raw.expand(examples, -1)  # [B, n]
        with standing_still(run.trainables), evaluating(run.model), knobs.playing(rows), run.autocast():
            loss = run.objective.loss(run.model, batch, run.rng)
            mean = loss.total / max(1.0, loss.weight)
        if not self.tune_scales:
            return mean.detach(), (torch.autograd.grad(mean, knobs.raw)[0], None)
        raw, scale = torch.autograd.grad(mean - self.entropy * knobs.entropy(), (knobs.raw, knobs.scale))
        return mean.detach(), (raw, scale)

    def rates(self, run: Run) -> tuple[float, float]:
        """The learning rates of raw numbers and scales; by default such that a number can cross its range within the run."""
        steps = (
            max(1.0, run.clock.total_steps - self.warmup * run.clock.steps_per_epoch)
            / self.train_steps
            * self.val_steps
        )
        usual = min(_QUICKEST, max(_SLOWEST, _REACH / steps))
        rate = self.rate if self.rate is not None else usual
        return rate, self.scale_rate if self.scale_rate is not None else rate

    def _next_aside(self, run: Run) -> dict[str, Tensor]:
        """The next batch of set-aside examples; a new order each time all were seen. Only policies of format and collation touch it."""
        if not self._order:
            self._shuffle(run, 0)
        number, at = divmod(self.seen, len(self._order))
        if number != self._round:
            self._shuffle(run, number)
        self.seen += 1
        batch = run.task.collate([run.encoded.train[i] for i in self._order[at]], run.tokenizer, run.recipe)
        for policy in run.slots.policies:
            if policy.phase >= Phase.FORMAT:
                batch = policy.batch(batch)
        batch = {name: value.to(run.device) for name, value in batch.items()}
        return unpacked(batch, run.tokenizer.pad_token_id) if is_packed(batch) else batch

    def _shuffle(self, run: Run, number: int) -> None:
        generator = self.ctx.generator(f"aside/{number}")
        order = [self.aside.aside[at] for at in torch.randperm(len(self.aside.aside), generator=generator).tolist()]
        self._order = run.task.batches(run.encoded.train, order, run.settings.batch_size or 1, run.recipe)
        self._round = number

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "noise": self.noise.get_state(),
            "seen": self.seen,
            "passes": self.passes,
            **self.layers.schedule.tensors(),
            **super().state_dict(),
        }
        for name, number in (("raw", self.knobs.raw), ("scale", self.knobs.scale)):
            state |= {
                f"adam.{name}.{key}": value.clone() for key, value in self.optimizer.state.get(number, {}).items()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.noise.set_state(state["noise"])
        self.seen, self.passes = int(state["seen"]), int(state["passes"])
        self.layers.schedule.load(state)
        for name, number in (("raw", self.knobs.raw), ("scale", self.knobs.scale)):
            prefix = f"adam.{name}."
            mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if mine:
                self.optimizer.state[number] = {
                    key: value.to(number.device) if value.dim() else value for key, value in mine.items()
                }


def linears_inside(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """The names of all plain linear layers that are, or lie inside, the named modules."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(name == root or name.startswith(f"{root}.") for root in modules)
    ]


@contextlib.contextmanager
def standing_still(trainables: Trainables) -> Iterator[None]:
    """No trainable takes part in differentiation, so that a graph begins only where something else does."""
    held = [parameter for parameter in trainables if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def planned_aside(rows: int, holdout: float, share: float) -> int:
    """About how many examples will be set aside."""
    return math.floor(rows * (1 - holdout) * share)
