"""A run: the model, the parts in their slots, the data cursor and the log, with snapshot and restore."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.control import Control
from engine.core.events import EventLog
from engine.core.facts import Facts
from engine.core.method import Composition
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.tasks.base import Encoded, Task
from engine.tasks.examples import take
from engine.train import checkpoint
from engine.train.checkpoint import Snapshot
from engine.train.clock import Clock
from engine.train.frozen import FrozenStates, remember
from engine.train.parts import (
    DataPolicy,
    GradientRule,
    Look,
    LossTerm,
    Objective,
    OptimizerFactory,
    Parametrization,
    Part,
    Schedule,
    Signal,
    StepReport,
    UpdateRule,
    Watcher,
    agreed,
    seeded,
)
from engine.train.saving import CheckpointWriter
from engine.train.trainables import (
    Trainables,
    births,
    collect,
    condition,
    load_optimizer_state,
    optimizer_state,
    restore_births,
)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the loop ended. All reasons but "paused" and "cancelled" lead to an export."""

    reason: str  # completed | early_stopped | budget | stopped | paused | cancelled
    message: str

    @property
    def exports(self) -> bool:
        return self.reason not in {"paused", "cancelled"}


@dataclass(kw_only=True)
class Slots:
    """The parts of a run, slot by slot, in the order in which they act."""

    parametrizations: list[Parametrization]
    objective: Objective
    terms: list[LossTerm]
    rules: list[GradientRule]
    policies: list[DataPolicy]
    optimizer: OptimizerFactory
    schedule: Schedule
    update_rule: UpdateRule
    watchers: list[Watcher]
    names: dict[str, Part] = field(default_factory=dict)  # "<slug>/<slot>" -> part, for state and trace


class Run:
    """Everything one training run holds. Parts receive it only where their hook says so (the update rule)."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        facts: Facts,
        composition: Composition,
        task: Task,
        model: nn.Module,
        tokenizer: Any,
        encoded: Encoded,
        slots: Slots,
        trainables: Trainables,
        optimizer: torch.optim.Optimizer,
        clock: Clock,
        folder: Path,
        log: EventLog,
        control: Control,
    ) -> None:
        self.recipe, self.facts, self.composition, self.task = recipe, facts, composition, task
        self.model, self.tokenizer, self.encoded = model, tokenizer, encoded
        self.slots, self.trainables, self.optimizer, self.clock = slots, trainables, optimizer, clock
        self.objective, self.terms, self.rules, self.schedule = (
            slots.objective,
            slots.terms,
            slots.rules,
            slots.schedule,
        )
        self.update_rule = slots.update_rule
        self.folder, self.log, self.control = folder, log, control
        self.saving = CheckpointWriter(folder, log, recipe.settings.keep_checkpoints)
        self.settings = recipe.settings
        self.device = torch.device(facts.machine.device)
        self.amp = recipe.settings.precision == "bf16"
        self.rng = seeded(recipe.settings.seed, "objective")
        self.best: dict[str, Any] = {}
        self.first_scores: dict[str, Any] = {}
        self.scores: dict[str, Any] = {}
        self.ending: Ending | None = None
        self.frozen: FrozenStates | None = None
        self.pause_at: int | None = None  # a search trains in slices: measure and pause behind this step
        self.warmup_steps = slots.schedule.warmup_steps(clock)
        self._order: list[int] = []
        self._batches: list[list[int]] = []
        self._tick = time.perf_counter()
        self._last_progress = 0.0
        self._window: tuple[float, int] = (0.0, 0)
        self._memory: tuple[float, int] = (0.0, 0)  # when it was read, and the bytes

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward and loss: bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.amp else contextlib.nullcontext()

    # ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_batches(self) -> list[dict[str, Tensor]]:
        """The collated micro-batches of the next optimizer batch; moves the cursor and starts a new epoch when one is over."""
        clock = self.clock
        if clock.batch >= len(self._batches):
            if self._batches:
                clock.epoch, clock.batch = clock.epoch + 1, 0
            self._start_epoch(self._ordered(clock.epoch))
        chosen = self._batches[clock.batch : clock.batch + self.settings.accumulate]
        clock.batch += len(chosen)
        made = self._gathered(chosen)
        if made:
            return made
        if len(chosen) == 1 and len(chosen[0]) > 1 and self.update_rule.cuts(clock.step + 1):
            chosen = [chosen[0][::2], chosen[0][1::2]]
        return [self._collate(indices) for indices in chosen]

    def _gathered(self, chosen: list[list[int]]) -> list[dict[str, Tensor]]:
        """What a data policy makes of the optimizer batch itself; empty when none does."""
        for policy in self.slots.policies:
            made = policy.gather(self, take(self.encoded.train, [index for indices in chosen for index in indices]))
            if made is not None:
                return [self._placed(batch) for batch in made]
        return []

    def _ordered(self, epoch: int) -> list[int]:
        generator = seeded(self.settings.seed, "order", str(epoch))
        order: Sequence[int] = torch.randperm(len(self.encoded.train), generator=generator).tolist()
        for policy in self.slots.policies:
            order = policy.rows(order, epoch)
        return list(order)

    def _start_epoch(self, order: list[int]) -> None:
        self._order = order
        self._batches = self.task.batches(self.encoded.train, order, self.settings.batch_size or 1, self.recipe)

    def _collate(self, indices: list[int]) -> dict[str, Tensor]:
        return self._placed(self.task.collate(take(self.encoded.train, indices), self.tokenizer, self.recipe))

    def _placed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for policy in self.slots.policies:
            batch = policy.batch(batch)
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def begin(self) -> None:
        """Let every part look at the run once before its first step."""
        for part in self.slots.names.values():
            part.begin(self)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """The lower blocks in which nothing learns are left out for texts that are known, where that is allowed."""
        self.frozen = remember(self)
        try:
            yield
        finally:
            if self.frozen is not None:
                self.frozen.close()
            self.frozen = None

    # ── after the step ────────────────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, report: StepReport) -> None:
        """Let parametrizations grow, prune or re-draw, and carry the optimizer's state along."""
        for part in self.slots.parametrizations:
            remap = part.adapt(report)
            if remap is not None:
                self.slots.optimizer.remap(self.optimizer, remap, self.trainables)
                self.trainables.apply(remap)
        self.sync()

    def sync(self) -> None:
        for part in self.slots.parametrizations:
            part.sync(self.model)

    def record(self, report: StepReport) -> dict[str, Any]:
        """Move the clock, read the step's numbers once, and write them to the log."""
        now = time.perf_counter()
        self.clock.seconds += now - self._tick
        self._tick = now
        tokens, seconds = report.tokens - self._window[1], self.clock.seconds - self._window[0]
        row: dict[str, Any] = {
            "step": report.step,
            "samples": report.samples,
            "tokens": report.tokens,
            "epoch": round(report.epoch, 6),
            "loss": float(report.loss),
            "grad_norm": float(report.grad_norm),
            "weight": report.weight,
            "learning_rate": report.learning_rate,
            **{key: float(value) if isinstance(value, Tensor) else value for key, value in report.extra.items()},
            **{key: float(value) for part in self.slots.names.values() for key, value in part.numbers().items()},
            "seconds": round(self.clock.seconds, 4),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "memory": self.memory(),
        }
        if seconds >= 1.0:
            self._window = (self.clock.seconds, report.tokens)
        self.log.metric(row)
        self.progress()
        return row

    def progress(self, *, force: bool = False) -> None:
        """Say how far the run is, at most twice a second."""
        now = time.monotonic()
        if force or now - self._last_progress >= 0.5:
            self._last_progress = now
            eta = self.clock.eta_seconds()
            self.log.emit(
                "progress",
                {
                    "done_steps": self.clock.step,
                    "total_steps": self.clock.total_steps,
                    "fraction": round(self.clock.progress, 4),
                    "eta_seconds": None if eta is None else round(eta, 1),
                },
                step=self.clock.step,
            )

    def look(self, row: dict[str, Any], evaluation: dict[str, Any] | None = None) -> list[Signal]:
        """Show the watchers a step (and its evaluation) and log what they say."""
        look = Look(
            step=self.clock.step,
            samples=self.clock.samples,
            planned_samples=self.clock.planned_samples,
            planned_steps=self.clock.total_steps,
            row=row,
            evaluation=evaluation,
            warmup_steps=self.warmup_steps,
        )
        return self.tell(agreed(signal for watcher in self.slots.watchers for signal in watcher.see(look)))

    def tell(self, signals: list[Signal]) -> list[Signal]:
        """Write signals to the log."""
        for signal in signals:
            self.log.emit("signal", signal.to_dict(), step=self.clock.step, key=signal.rule)
        return signals

    def evaluate(self) -> dict[str, Any]:
        """Score the held-out examples; draws from no generator and leaves the model as it was."""
        with self.autocast():
            scores = self.task.evaluate(self.model, self.encoded, self.tokenizer, self.recipe, self.device)
        self.scores = scores
        better = bool(np.isfinite(scores["eval_loss"])) and (
            not self.best or self.task.goodness(scores) > self.task.goodness(self.best)
        )
        if better:
            self.best = {"step": self.clock.step, **scores}
        if self.clock.step == 0:
            self.first_scores = scores
        learners = condition(self.trainables, self.optimizer)
        self.log.emit(
            "evaluation",
            {
                **scores,
                "samples": self.clock.samples,
                "epoch": round(self.clock.epochs_done, 6),
                "best": better,
                "learners": learners,
            },
            step=self.clock.step,
        )
        self._tick = time.perf_counter()  # measuring is not training time
        return {**scores, "learners": learners}

    def answer(self, count: int, prefix: str = "") -> list[dict[str, str]]:
        """Let the model answer a few held-out examples, and log it; draws from no generator. `prefix` tells kinds of answers of one step apart."""
        if not count:
            return []
        with torch.random.fork_rng(devices=[]), self.autocast():  # a new classifier in fp32 stands on a bf16 model
            samples = self.task.samples(self.model, self.encoded, self.tokenizer, count)
        for index, sample in enumerate(samples):
            self.log.emit("sample", dict(sample), step=self.clock.step, key=f"{prefix}{index}")
        self._tick = time.perf_counter()  # answering is not training time
        return samples

    def memory(self) -> int:
        """Bytes: peak of the GPU, or the resident set of this process; looked up ten times a second, which costs more than all else in a row."""
        now = time.perf_counter()
        if now - self._memory[0] >= 0.1:
            self._memory = (now, self._read_memory())
        return self._memory[1]

    def _read_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> Snapshot:
        tensors, values = checkpoint.generator_states({"objective": self.rng}, self.device)
        tensors.update(checkpoint.running_statistics(self.model))
        tensors["order"] = torch.tensor(self._order, dtype=torch.int64)
        state: dict[str, Any] = {}
        for name, part in self.slots.names.items():
            own, state[name] = checkpoint.split_state(f"part/{name}", part.state_dict())
            tensors.update(own)
        moments, numbers = optimizer_state(self.optimizer, self.trainables)
        return Snapshot(
            step=self.clock.step,
            trainables=self.trainables.tensors(),
            optimizer=moments,
            tensors=tensors,
            values={
                "clock": self.clock.state_dict(),
                "parts": state,
                "optimizer": numbers,
                "names": [name for name, _ in self.trainables.items()],
                "born": births(self.optimizer, self.trainables),
                "rng": values,
                "best": self.best,
                "first_scores": self.first_scores,
                "scores": self.scores,
                "ending": asdict(self.ending) if self.ending else None,
                "event": self.log.seq,
                "fingerprint": self.recipe.fingerprint(),
            },
        )

    def restore(self, snapshot: Snapshot, *, fresh_plan: bool = False) -> None:
        """Continue exactly where a snapshot was taken; `restore_structure` ran before the trainables were collected.

        fresh_plan: the snapshot comes from a run with another plan; how far to go, and whether it is over, this run's recipe says.
        """
        values = snapshot.values
        self.clock.load_state_dict(values["clock"], plan=not fresh_plan)
        for name, part in self.slots.names.items():
            if part in self.slots.parametrizations:
                continue
            if name in values["parts"] or part not in self.slots.watchers:  # a watcher may have come into being since
                part.load_state_dict(checkpoint.join_state(f"part/{name}", snapshot.tensors, values["parts"][name]))
        self.trainables.load(snapshot.trainables)
        restore_births(self.optimizer, self.trainables, values["born"])
        load_optimizer_state(self.optimizer, self.trainables, snapshot.optimizer, values["optimizer"])
        statistics = checkpoint.running_statistics(self.model)
        for name, buffer in statistics.items():
            buffer.copy_(snapshot.tensors[name])
        self.sync()
        self.best, self.first_scores, self.scores = values["best"], values["first_scores"], values["scores"]
        self.ending = Ending(**values["ending"]) if values["ending"] and not fresh_plan else None
        order: list[int] = snapshot.tensors["order"].tolist()
        if order:
            self._start_epoch(order)
        checkpoint.restore_generators(snapshot.tensors, values["rng"], {"objective": self.rng}, self.device)

    def save(self) -> None:
        """Hand a checkpoint of this step border to the writer; the training may go on at once, and it goes on the disk behind the log."""
        self.saving.wait()
        self.log.flush()
        self.saving.put(self.snapshot(), self.best.get("step"))
        self._tick = time.perf_counter()

    def collect(self) -> None:
        """Tell of a checkpoint that has come to the disk; what kept one from there is raised here."""
        if self.saving.collect():
            self._tick = time.perf_counter()

    def load_best(self) -> bool:
        """Put the best weights back before export; False when the current ones are the best or no better were kept.

        What learns may have grown or changed since, so structure and trainables become those of the checkpoint. The optimizer does not follow.
        """
        self.saving.wait()
        step = self.best.get("step")
        path = self.folder / checkpoint.FOLDER / f"step-{step or 0:08d}"
        if step is None or step == self.clock.step or not path.exists():
            return False
        best = checkpoint.load(path, optimizer=False)
        restore_structure(self.slots, best)
        self.trainables = collect(self.model, self.slots.parametrizations, self.task.fresh(self.model))
        self.trainables.load(best.trainables)
        self.sync()
        return True


def attach_parts(slots: Slots, task: Task, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe) -> None:
    """Let the data policies see the examples and the parametrizations the untouched model, then put their mechanics into it."""
    size = recipe.settings.batch_size or 1
    order = list(range(min(len(encoded.train), 8 * size)))
    few = [
        task.collate(take(encoded.train, indices), tokenizer, recipe)
        for indices in task.batches(encoded.train, order, size, recipe)
    ]
    for policy in slots.policies:
        policy.survey(encoded)
    for part in slots.parametrizations:
        part.calibrate(model, few)
    for part in slots.parametrizations:
        part.attach(model)


def restore_structure(slots: Slots, snapshot: Snapshot) -> None:
    """Give the attached parametrizations their state back, so that what learns has the names and shapes it had in the snapshot."""
    for name, part in slots.names.items():
        if part in slots.parametrizations:
            part.load_state_dict(
                checkpoint.join_state(f"part/{name}", snapshot.tensors, snapshot.values["parts"][name])
            )


def seed_everything(seed: int) -> None:
    """Seed every global generator; each part has its own besides."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_threads() -> None:
    """The stated thread count of a child: BONSAI_THREADS, or every core."""
    torch.set_num_threads(int(os.environ.get("BONSAI_THREADS", "0")) or os.cpu_count() or 1)


def parts_by_slot(composition: Composition, built: dict[int, Sequence[Any]]) -> Slots:
    """Sort built parts into their slots. `built` maps the place in `composition.chosen` to the parts of that method."""
    where: dict[Slot, list[Any]] = {slot: [] for slot in Slot}
    names: dict[str, Part] = {}
    place = {id(item): index for index, item in enumerate(composition.chosen)}
    for slot in Slot:
        for item in composition.in_slot(slot):
            parts = built[place[id(item)]]
            part = parts[item.method.slots.index(slot)]
            where[slot].append(part)
            names[f"{item.slug}.{item.index}/{slot.value}"] = part
    return Slots(
        parametrizations=where[Slot.PARAMETRIZATION],
        objective=where[Slot.OBJECTIVE][0],
        terms=where[Slot.LOSS_TERM],
        rules=where[Slot.GRADIENT_RULE],
        policies=where[Slot.DATA_POLICY],
        optimizer=where[Slot.OPTIMIZER][0],
        schedule=where[Slot.SCHEDULE][0],
        update_rule=where[Slot.UPDATE_RULE][0],
        watchers=where[Slot.WATCHER],
        names=names,
    )
