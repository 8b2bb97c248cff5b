"""What a checkpoint costs the training: the time for which it stands still, beside writing at once, and the steps beside the writer. And what telling costs."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.bench.measure import ratio_interval
from engine.bench.pages import Goal, Section, Study
from engine.bench.workbench import Workbench, forward, random_llama, story_file
from engine.parts.optimizers import gradient_norm
from engine.train import checkpoint
from engine.train.run import Run, set_threads

SHAPE = {"hidden": 640, "layers": 10, "ffn": 1728, "heads": 10, "vocab": 8192}
EVERY, ROUNDS = 10, 5
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "epochs": 100,
    "batch_size": 2,
    "max_length": 128,
    "precision": "fp32",
}
FULL: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {}), ("clip", {}), ("patience", {})]
LORA: list[tuple[str, dict[str, Any]]] = [("lora", {"r": 8, "targets": "all-linear"}), ("clip", {}), ("patience", {})]
NONE, BESIDE, AT_ONCE = "no checkpoint", "beside the training", "at once"
SAVES: dict[str, Callable[[Run], None]] = {
    NONE: lambda run: None,
    BESIDE: Run.save,
    AT_ONCE: lambda run: save_at_once(run),
}


@dataclass
class Block:
    """Seconds of ten steps, of which the first one saves."""

    steps: list[float] = field(default_factory=list)  # whole, saving included
    telling: list[float] = field(default_factory=list)  # record, watchers, requests
    stall: float = 0.0  # saving, and hearing that it is done

    @property
    def beyond(self) -> float:
        """The step that saves, beyond the middle of the others."""
        return self.steps[0] - statistics.median(self.steps[1:])


def save_at_once(run: Run) -> None:
    """A checkpoint for which the run waits: log, tensors and names are on the disk when this returns."""
    run.log.sync()
    path = checkpoint.save(run.folder, run.snapshot().draft())
    checkpoint.prune(run.folder, run.best.get("step"))
    run.log.emit("checkpoint", {"path": f"{checkpoint.FOLDER}/{path.name}", "best": False}, step=run.clock.step)


def measure() -> list[Section]:
    """Run the study and return its tables."""
    set_threads()
    logging.disable(logging.WARNING)
    bench = Workbench()
    try:
        model, data = random_llama(bench.folder, **SHAPE), story_file(bench.folder, 64)
        full = bench.run(bench.recipe(f"folder:{model}", f"file:{data}", FULL, **SETTINGS))
        micro = full.next_batches()
        first = _first_save(full, micro)
        blocks: dict[str, list[Block]] = {kind: [] for kind in SAVES}
        kinds = list(SAVES)
        for turn in range(ROUNDS):
            for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
                blocks[kind].append(_block(full, micro, SAVES[kind]))
        telling = {"full fine-tuning": (blocks[NONE], _norms(full, micro))}
        size = sum(t.nbytes for tensors in full.snapshot().draft().files.values() for t in tensors.values())
        lora = bench.run(bench.recipe(f"folder:{model}", f"file:{data}", LORA, **SETTINGS))
        micro = lora.next_batches()
        _block(lora, micro, SAVES[NONE])
        telling["LoRA r=8"] = ([_block(lora, micro, SAVES[NONE]) for _ in range(ROUNDS)], _norms(lora, micro))
        return [_stalls(blocks, first, size, full.trainables.num_elements()), _telling(telling)]
    finally:
        bench.close()


def _first_save(run: Run, micro: list[dict[str, Tensor]]) -> float:
    """Seconds of the first save with optimizer state, which also gets the memory for the copies; the steps before warm up."""
    run.save()
    for _ in range(2):
        _step(run, micro)
    run.saving.wait()
    start = time.perf_counter()
    run.save()
    taken = time.perf_counter() - start
    run.saving.wait()
    return taken


def _step(run: Run, micro: list[dict[str, Tensor]]) -> tuple[float, float]:
    """A step as the loop makes it: (seconds of all of it, of telling)."""
    start = time.perf_counter()
    report = run.update_rule.update(run, micro)
    run.clock.step, run.clock.samples, run.clock.tokens = report.step, report.samples, report.tokens
    run.adapt(report)
    done = time.perf_counter()
    run.look(run.record(report))
    run.control.poll()
    end = time.perf_counter()
    return end - start, end - done


def _block(run: Run, micro: list[dict[str, Tensor]], save: Callable[[Run], None]) -> Block:
    block = Block()
    for number in range(EVERY):
        whole, telling = _step(run, micro)
        start = time.perf_counter()
        if number == 0:
            save(run)
        run.collect()
        stood = time.perf_counter() - start
        block.steps.append(whole + stood)
        block.telling.append(telling)
        block.stall += stood
    run.saving.wait()
    return block


def _norms(run: Run, micro: list[dict[str, Tensor]]) -> list[float]:
    """Seconds of the norm over all gradients of this run."""
    (forward(run, micro[0])).backward()  # type: ignore[no-untyped-call]
    found = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        float(gradient_norm(run.trainables))
        found.append(time.perf_counter() - start)
    run.optimizer.zero_grad(set_to_none=True)
    return found[1:]


def _stalls(blocks: dict[str, list[Block]], first: float, size: int, num_trainable: int) -> Section:
    section = Section(
        title=f"Full fine-tuning of a Llama with {num_trainable / 1e6:.0f} M parameters, a checkpoint every {EVERY} steps",
        columns=("checkpoint", "median step, s", "nine of ten within, s", "longest step, s", "training stands still, s", "95 % interval",
                 "saving step beyond the median, s", "ten steps / without"),
        intro=f"A checkpoint holds {size / 1e6:,.0f} MB: weights and both moments of AdamW, in fp32. *At once* hashes, writes and syncs while the run waits; "
        "*beside the training* the run waits for a copy in memory, and a thread does the rest during the steps that follow. "
        f"The same batch of {SETTINGS['batch_size']} texts in every step; {ROUNDS} rounds of {EVERY} steps each, interleaved.",
    )  # fmt: skip
    plain = [sum(block.steps) for block in blocks[NONE]]
    for kind, found in blocks.items():
        steps = sorted(second for block in found for second in block.steps)
        stall = median_interval([block.stall for block in found])
        longer = ratio_interval([sum(block.steps) for block in found], plain)
        section.rows.append((
            kind, f"{statistics.median(steps):.3f}", f"{steps[int(0.9 * len(steps))]:.3f}", f"{steps[-1]:.3f}", f"{stall[0]:.4f}",
            f"{stall[1]:.4f} – {stall[2]:.4f}", f"{statistics.median(block.beyond for block in found):.3f}",
            f"{longer[0]:.3f} ({longer[1]:.3f} – {longer[2]:.3f})",
        ))  # fmt: skip
    step = statistics.median(second for block in blocks[NONE] for second in block.steps)
    stall = median_interval([block.stall for block in blocks[BESIDE]])
    gain = ratio_interval([block.stall for block in blocks[AT_ONCE]], [block.stall for block in blocks[BESIDE]])
    section.goals += [
        Goal(number="P2", goal="training stands still for a checkpoint; one step or 0.1 s are allowed, whichever is longer", value=stall[0],
             interval=stall[1:], target=max(step, 0.1), unit="s", baseline="the median step"),
        Goal(number="P2", goal="how many times shorter it stands still than when writing at once", value=gain[0], interval=gain[1:], target=10.0,
             better="more", baseline="the same checkpoint, written and synced while the run waits"),
    ]  # fmt: skip
    section.remarks += [f"{goal.goal}: {goal.value:.3g} {goal.unit} ({goal.verdict})." for goal in section.goals]
    section.remarks.append(f"The first checkpoint with moments also gets the memory for its copy: {first:.3f} s.")
    return section


def _telling(measured: Mapping[str, tuple[Sequence[Block], Sequence[float]]]) -> Section:
    section = Section(
        title="Telling of every step",
        columns=("training", "median step, s", "reading, judging and logging the row, µs", "norm of all gradients, µs", "share of a step", "95 % interval"),
        intro="Every step leaves a row with loss, gradient norm and more, shows it to the watchers, and looks for a request. The norm is what clipping "
        "needs as well; it is counted here in full.",
    )  # fmt: skip
    for name, (blocks, norms) in measured.items():
        rows = [statistics.fmean(block.telling) for block in blocks]
        steps = [statistics.median(block.steps) for block in blocks]
        share = ratio_interval([row + norm for row, norm in zip(rows, norms, strict=True)], steps)
        section.rows.append((
            name, f"{statistics.median(steps):.3f}", f"{statistics.median(rows) * 1e6:.0f}", f"{statistics.median(norms) * 1e6:,.0f}", f"{share[0]:.3%}",
            f"{share[1]:.3%} – {share[2]:.3%}",
        ))  # fmt: skip
        section.goals.append(
            Goal(number="P1", goal=f"share of a step that loss and gradient norm of every step take, {name}", value=share[0], interval=share[1:],
                 target=0.005, baseline="the whole step, Llama 52 M",
                 reason="Nearly all of it is the norm over every gradient, which clipping needs in any case.")
        )  # fmt: skip
    section.remarks += [f"{goal.goal}: {goal.value:.3%} ({goal.verdict})." for goal in section.goals]
    return section


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median of a few values with its 95 % bootstrap interval."""
    return ratio_interval(values, [1.0] * len(values))


STUDY = Study(name="checkpoints", page="checkpoints.md", minutes=2.5, quick=True, seed=0, run=measure)
