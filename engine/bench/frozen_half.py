"""What remembering the frozen lower part is worth: steps of the second pass over the data, with and without, in one process, interleaved."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from engine.bench.measure import interleave, ratio_interval
from engine.bench.pages import Goal, Section, Study
from engine.bench.training_step import batches_of, conversations
from engine.bench.workbench import Workbench, random_llama, step
from engine.train.run import Run, set_threads

SHAPE = {"hidden": 384, "layers": 6, "ffn": 1024, "heads": 6, "vocab": 4096}
ROUNDS, NUM_BATCHES = 7, 2
LORA = {"r": 8, "alpha": 16}
# name -> (method, its parameters, aim)
VARIANTS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "LoRA, top half": ("lora", {**LORA, "top_blocks": 3}, 1.5),
    "LoRA, top third": ("lora", {**LORA, "top_blocks": 2}, None),
    "ladder side network": ("lst", {"k": 8, "init": "weight"}, None),
}


def measure() -> list[Section]:
    """Run the study and return its table."""
    set_threads()
    logging.disable(logging.WARNING)
    bench = Workbench()
    section = Section(
        title="Steps with the frozen part remembered, Llama 13 M",
        columns=("what learns", "step, ms", "remembered, ms", "plain / remembered", "95 % interval", "measuring", "95 % interval", "pays back after, passes"),
        intro="Hidden 384, 6 layers, fp32, conversations in batches of 8, packed, logits at the answers. The blocks below everything that learns ran once for "
        "every text before the first step; from then on a step reads what left them from a mapped file. Measuring: the held-out conversations. A pass costs its "
        f"share of the time that was spent ahead. {ROUNDS} interleaved rounds over the same batches.",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(bench.close)
        model, data = f"folder:{random_llama(bench.folder, **SHAPE)}", f"file:{conversations(bench.folder)}"
        for name, (slug, params, target) in VARIANTS.items():
            runs: dict[str, Run] = {}
            for mode in ("off", "auto"):
                recipe = bench.recipe(model, data, [(slug, params)], task="instruct", learning_rate=1e-4, epochs=50, batch_size=8, max_length=256,
                                      precision="fp32", holdout=0.05, frozen_cache=mode)  # fmt: skip
                runs[mode] = bench.run(recipe)
            start = time.perf_counter()
            stack.enter_context(runs["auto"].remembering())
            ahead = time.perf_counter() - start
            assert runs["auto"].frozen is not None
            steps = interleave({mode: _steps(run) for mode, run in runs.items()}, rounds=ROUNDS, warm=1, calls=1)
            scores = interleave({mode: _scores(run) for mode, run in runs.items()}, rounds=5, warm=1)
            value, *interval = ratio_interval(steps["off"].seconds, steps["auto"].seconds)
            measured, *around = ratio_interval(scores["off"].seconds, scores["auto"].seconds)
            count = NUM_BATCHES
            saved = (steps["off"].median - steps["auto"].median) / count * runs["off"].clock.steps_per_epoch
            section.rows.append((
                name, f"{steps['off'].median / count * 1e3:.1f}", f"{steps['auto'].median / count * 1e3:.1f}",
                f"{value:.2f}", f"{interval[0]:.2f} – {interval[1]:.2f}", f"{measured:.2f}", f"{around[0]:.2f} – {around[1]:.2f}", f"{ahead / saved:.1f}",
            ))  # fmt: skip
            section.goals.append(
                Goal(number="P1" if target else "", goal=f"step of the second pass without and with the frozen part remembered: {name}", value=value,
                     interval=(interval[0], interval[1]), target=target, better="more", baseline="the same run with frozen_cache off",
                     reason="Half of the blocks give one forward pass back: a third of a LoRA step at the most, and logits stay." if target else "")
            )  # fmt: skip
    section.remarks += [f"{goal.goal}: {goal.value:.2f} ({goal.verdict})." for goal in section.goals if goal.target]
    return [section]


def _steps(run: Run) -> Callable[[], None]:
    batches = batches_of(run)[:NUM_BATCHES]

    def once() -> None:
        for micro in batches:
            step(run, micro)

    return once


def _scores(run: Run) -> Callable[[], object]:
    return lambda: run.task.evaluate(run.model, run.encoded, run.tokenizer, run.recipe, run.device)


STUDY = Study(name="frozen-half", page="frozen-half.md", minutes=1.5, quick=True, seed=17, run=measure)
