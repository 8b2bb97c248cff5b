"""What compiling the blocks of a model costs and gives on this machine: first call and steps, plain and compiled, in one process, interleaved."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from engine.bench.measure import interleave, ratio_interval
from engine.bench.pages import Goal, Section, Study
from engine.bench.training_step import LORA, SHAPE, batches_of, conversations
from engine.bench.workbench import Workbench, random_llama, step
from engine.ops.compiling import PAYS
from engine.train.compiled import compiled
from engine.train.run import Run, set_threads

SMALL = {"hidden": 384, "layers": 6, "ffn": 1024, "heads": 6, "vocab": 8192}
MODELS = {"13 M": SMALL, "52 M": SHAPE}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {"LoRA": LORA, "full": ("full-finetuning", {})}
# In this order, because a busy machine may not reach the last ones.
CASES = (
    ("13 M", "LoRA", "fp32"), ("52 M", "LoRA", "bf16"), ("13 M", "full", "fp32"), ("52 M", "full", "fp32"),
    ("13 M", "LoRA", "bf16"), ("52 M", "LoRA", "fp32"), ("13 M", "full", "bf16"), ("52 M", "full", "bf16"),
)  # fmt: skip
MINUTES = 17
ROUNDS, NUM_BATCHES = 5, 2


def measure() -> list[Section]:
    """Run the study and return its table."""
    set_threads()
    logging.disable(logging.WARNING)
    section = Section(
        title="Steps with compiled blocks",
        columns=("model", "what learns", "numbers", "step, ms", "compiled, ms", "plain / compiled", "95 % interval", "first step, s", "again, s",
                 "pays back after, min"),
        intro=f"Random-weight Llamas, conversations in batches of 8, packed, logits at the answers; {ROUNDS} interleaved rounds over the same batches. The first "
        "compiled step starts with an empty cache; 'again' is the first step of a second run that finds what the first one kept. It pays back when the steps have "
        "won what the first one cost.",
    )  # fmt: skip
    best, start, late = 0.0, time.monotonic(), []
    for size, name, precision in CASES:
        case = f"{size}, {name}, {precision}"
        if time.monotonic() - start > MINUTES * 60:
            late.append(case)
            continue
        ratio, row = _pair(MODELS[size], METHODS[name], precision)
        print(f"  {case}: {' | '.join(row)}", flush=True)
        best = max(best, ratio[0])
        section.rows.append((size, name, precision, *row))
        section.goals.append(
            Goal(goal=f"step, plain against compiled: Llama {case}", value=ratio[0], interval=ratio[1:], better="more", baseline="the same run with compile off")
        )  # fmt: skip
    told = PAYS["cpu"]
    section.remarks += [
        f"The best of these is {best:.2f}; `engine.ops.compiling` counts {told.faster:.2f} for a processor, so `auto` compiles there only "
        "if that number is above 1.",
        "No GPU was measured. `auto` decides there by published figures, the lower gain (+16 %) against the higher cost (70 s).",
    ]
    if late:
        section.remarks.append(f"Not begun within {MINUTES} minutes, and so not measured: {'; '.join(late)}.")
    return [section]


def _pair(
    shape: dict[str, Any], method: tuple[str, dict[str, Any]], precision: str
) -> tuple[tuple[float, float, float], tuple[str, ...]]:
    bench = Workbench()
    with contextlib.ExitStack() as stack:
        stack.callback(bench.close)
        stack.enter_context(_home(str(bench.folder / "home")))
        model, data = f"folder:{random_llama(bench.folder, **shape)}", f"file:{conversations(bench.folder)}"
        runs = {
            mode: bench.run(
                bench.recipe(
                    model,
                    data,
                    [method],
                    task="instruct",
                    learning_rate=1e-4,
                    epochs=50,
                    batch_size=8,
                    max_length=256,
                    precision=precision,
                    holdout=0.05,
                    compile=mode,
                )
            )
            for mode in ("off", "on")
        }
        seconds: list[float] = []
        with compiled(runs["on"]):
            seconds.append(_timed(_steps(runs["on"], 1)))
        stack.enter_context(compiled(runs["on"]))
        seconds.append(_timed(_steps(runs["on"], 1)))
        steps = interleave({mode: _steps(run, NUM_BATCHES) for mode, run in runs.items()}, rounds=ROUNDS, warm=1)
    ratio = ratio_interval(steps["off"].seconds, steps["on"].seconds)
    plain, quick = (steps[mode].median / NUM_BATCHES for mode in ("off", "on"))
    back = (seconds[0] - plain) / (plain / quick - 1) / 60 if quick < plain else None
    return ratio, (
        f"{plain * 1e3:.0f}", f"{quick * 1e3:.0f}", f"{ratio[0]:.2f}", f"{ratio[1]:.2f} – {ratio[2]:.2f}", f"{seconds[0]:.0f}", f"{seconds[1]:.0f}",
        f"{back:.0f}" if back is not None else "never",
    )  # fmt: skip


def _steps(run: Run, count: int) -> Callable[[], None]:
    batches = batches_of(run)[:count]

    def once() -> None:
        for micro in batches:
            step(run, micro)

    return once


def _timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextlib.contextmanager
def _home(folder: str) -> Any:
    """A home of its own, so that nothing is found that an earlier run kept."""
    before = os.environ.get("BONSAI_HOME")
    os.environ["BONSAI_HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("BONSAI_HOME") if before is None else os.environ.update(BONSAI_HOME=before)


STUDY = Study(name="compile", page="compile.md", minutes=14, quick=False, seed=17, run=measure)
