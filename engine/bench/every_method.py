"""One row for every method of the catalogue: what it trains, keeps for backward and keeps in the optimizer, and what a step or a job costs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.bench.backward import saved_bytes
from engine.bench.measure import interleave, ratio_interval
from engine.bench.pages import Goal, Section, Study
from engine.bench.workbench import Workbench, as_peft, forward, random_llama, step
from engine.core.method import TrainMethod, TransformMethod
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.starters import dialogues
from engine.train.run import Run, set_threads
from engine.train.trainables import optimizer_bytes

ROUNDS = 5
COMMON: list[tuple[str, dict[str, Any]]] = [("adamw", {}), ("constant", {}), ("clip", {})]
LORA = {"alpha": 16, "targets": "all-linear"}
SHAPE = {"hidden": 384, "layers": 6, "ffn": 1024, "heads": 6}
LARGE = {
    "hidden": 512,
    "layers": 6,
    "ffn": 1376,
    "heads": 8,
    "rows": 32_000,
}  # 52 M, a usual share of it in the word tables
STEP_AIM, SHARE_AIM = 1.25, 0.95  # of the time of peft's LoRA, for so many of the methods
COLUMNS_AIM, OWN_LORA_AIM, HALF_AIM, LADDER_BYTES_AIM = 0.9, 1.0, 0.75, 0.45
SETTINGS: dict[str, Any] = {"epochs": 50, "batch_size": 4, "max_length": 256, "precision": "fp32", "holdout": 0.05}

# Why half fine-tuning may miss its aim where the word tables are large.
TABLES = "word tables and output layer, which its card always trains, hold 33 of the 52 million weights of this model; the row with them locked leaves them out"


def learners(bench: Workbench, data: str) -> Section:
    """Methods that say what learns, each beside peft's LoRA of the nearest trainable count."""
    model = f"folder:{random_llama(bench.folder, **SHAPE)}"
    section = Section(
        title="Methods that say what learns",
        columns=("method", "trainable", "LoRA beside it", "step, ms (median)", "spread", "step / LoRA", "95 % interval",
                 "saved for backward / LoRA", "optimizer / LoRA"),
        intro=f"Llama 13 M, fp32, 4 × 256 tokens of our stories, AdamW, every method with its own defaults; {ROUNDS} interleaved rounds each. The "
        "LoRA beside it (peft, every linear layer) has the rank whose trainable count is nearest, from 1 to 256.",
    )  # fmt: skip
    steps: dict[str, Goal] = {}
    saved: dict[str, Goal] = {}
    for slug, method in catalogue().items():
        if not issubclass(method, TrainMethod) or Slot.PARAMETRIZATION not in method.slots:
            continue
        if method.needs.tasks and "causal_lm" not in method.needs.tasks:
            continue
        print(f"  {slug}", flush=True)
        run = bench.run(bench.recipe(model, data, [(slug, {}), *_common(method)], **SETTINGS))
        count = run.trainables.num_elements()
        rank = _rank(bench, model, data, count)
        lora = as_peft(bench.run(bench.recipe(model, data, [("lora", {"r": rank, **LORA}), *COMMON], **SETTINGS)))
        beside = f"r={rank}, {lora.trainables.num_elements():,}"
        row, steps[slug], saved[slug] = _row(slug, method.card.title, run, lora, beside)
        section.rows.append(row)
    section.goals.append(_share(steps))
    steps["paca"] = replace(steps["paca"], number="P1", target=COLUMNS_AIM)
    steps["lora"] = replace(steps["lora"], number="P1", target=OWN_LORA_AIM)
    saved["lst"] = replace(saved["lst"], number="P1", target=LADDER_BYTES_AIM)
    section.goals += [*steps.values(), *saved.values()]
    section.remarks += [f"{goal.goal}: {goal.value:.2f} ({goal.verdict})." for goal in section.goals if goal.number]
    return section


def _share(steps: Mapping[str, Goal]) -> Goal:
    """The share of methods whose step takes at most STEP_AIM of LoRA's; those above say why on their cards."""

    def share(times: Iterable[float]) -> float:
        return sum(time <= STEP_AIM for time in times) / len(steps)

    ends = [goal.interval or (goal.value, goal.value) for goal in steps.values()]
    slow = [catalogue()[slug].card for slug, goal in steps.items() if goal.value > STEP_AIM]
    return Goal(
        number="P1", goal=f"share of the methods that say what learns whose step takes at most {STEP_AIM:g} of LoRA's", unit="share",
        value=share(goal.value for goal in steps.values()), interval=(share(high for _, high in ends), share(low for low, _ in ends)),
        target=SHARE_AIM, better="more", baseline="peft LoRA of the nearest trainable count",
        reason=" ".join(f"{card.title}: its card says when not to take it. {card.avoid_when}" for card in slow),
    )  # fmt: skip


def halves(bench: Workbench, data: str) -> Section:
    """Half fine-tuning beside full fine-tuning, where the word tables are a usual share of the model."""
    model = f"folder:{random_llama(bench.folder, **LARGE)}"
    plans: dict[str, tuple[str, dict[str, Any]]] = {
        "Full fine-tuning": ("full-finetuning", {}),
        "Half fine-tuning": ("hft", {}),
        "Half fine-tuning, word tables locked": ("hft", {"outside": "frozen"}),
    }
    runs = {name: bench.run(bench.recipe(model, data, [plan, *COMMON], **SETTINGS)) for name, plan in plans.items()}
    timings = interleave({name: _turn(run) for name, run in runs.items()}, rounds=ROUNDS)
    full = next(iter(runs))
    section = Section(
        title="Half of the weights",
        columns=("method", "trainable", "step, ms (median)", "spread", "step / full", "95 % interval", "optimizer / full"),
        intro=f"Llama 52 M (hidden 512, 6 layers, word table and output layer of 32,000 rows each), fp32, 4 × 256 tokens, AdamW; {ROUNDS} interleaved "
        "rounds. What is locked has no weight gradient, no optimizer state and no optimizer step; the backward pass still goes through every layer.",
    )  # fmt: skip
    state = optimizer_bytes(runs[full].optimizer)
    for name, run in runs.items():
        mine = timings[name]
        ratio, low, high = ratio_interval(mine.seconds, timings[full].seconds)
        section.rows.append((name, f"{run.trainables.num_elements():,}", f"{mine.median * 1e3:.1f}", f"{mine.spread:.1%}", f"{ratio:.3f}",
                             f"{low:.3f} – {high:.3f}", f"{optimizer_bytes(run.optimizer) / state:.3f}"))  # fmt: skip
        section.goals.append(Goal(number="P1", goal=f"step time: {name.lower()}", value=ratio, interval=(low, high), target=HALF_AIM,
                                  baseline="full fine-tuning, same model and batch", reason=TABLES if "locked" not in name else ""))  # fmt: skip
    section.remarks += [f"{goal.goal}: {goal.value:.2f} ({goal.verdict})." for goal in section.goals]
    return section


def others(bench: Workbench) -> Section:
    """Objectives, optimizers, schedules, rules, data policies and watchers, each added to the same LoRA run."""
    section = Section(
        title="Methods that stand beside what learns",
        columns=("method", "slots", "goal", "step, ms (median)", "spread", "step / without it", "95 % interval", "optimizer / without it"),
        intro=f"Llama 13 M with LoRA r=8 on every linear layer, fp32; the same run with the method and without it (or with what stands there by "
        f"itself). {ROUNDS} interleaved rounds. Methods that let the model answer pay for the answers; a step of theirs is another thing than a step "
        "on written examples.",
    )  # fmt: skip
    for slug, method in catalogue().items():
        if not issubclass(method, TrainMethod) or Slot.PARAMETRIZATION in method.slots:
            continue
        if method.needs.kinds and "decoder" not in method.needs.kinds:
            continue
        task = method.needs.tasks[0] if method.needs.tasks else "causal_lm"
        data = task_data(bench, task)
        if data is None:
            continue
        print(f"  {slug}", flush=True)
        model = f"folder:{random_llama(bench.folder, **SHAPE)}"
        base = [("lora", {"r": 8, **LORA})]
        plain = [item for item in COMMON if item[0] != slug and not _same_slot(item[0], method)]
        with_it = bench.run(
            bench.recipe(model, data, [*base, *plain, (slug, method.presets["tiny"])], task=task, **SETTINGS)
        )
        without = (
            bench.run(bench.recipe(model, data, [*base, *COMMON], task=_plain_task(task), **SETTINGS))
            if _plain_task(task) == task
            else None
        )
        timings = interleave(
            {"with": _turn(with_it), **({"without": _turn(without)} if without else {})}, rounds=ROUNDS
        )
        mine = timings["with"]
        ratio = ratio_interval(mine.seconds, timings["without"].seconds) if without else None
        section.rows.append((
            method.card.title, ", ".join(slot.words for slot in method.slots), task, f"{mine.median * 1e3:.1f}", f"{mine.spread:.1%}",
            f"{ratio[0]:.3f}" if ratio else "–", f"{ratio[1]:.3f} – {ratio[2]:.3f}" if ratio else "–",
            f"{optimizer_bytes(with_it.optimizer) / max(1, optimizer_bytes(without.optimizer)):.2f}" if without else "–",
        ))  # fmt: skip
    return section


def transforms(bench: Workbench) -> Section:
    """Transformations: seconds, beside reading and writing the same weights once."""
    from engine.ops.folder import run_folder

    section = Section(
        title="Methods that make new weights",
        columns=("method", "models", "seconds", "/ copying the weights once", "result, MB"),
        intro="The whole job on a Llama of 13 M (with the other models made by moving its weights a little), evaluation and certificate left out "
        "where no data are needed. One run each: these are sizes, not races.",
    )  # fmt: skip
    data = task_data(bench, "causal_lm")
    base = random_llama(bench.folder, **SHAPE)
    copying = _copy_seconds(base)
    for slug, method in catalogue().items():
        if not issubclass(method, TransformMethod):
            continue
        count = max(method.num_models[0], 3 if method.num_models[1] is None else method.num_models[0])
        folder = bench.folder / f"transform-{slug}"
        folder.mkdir()
        recipe = bench.recipe(
            f"folder:{base}", str(data), [(slug, method.presets["tiny"])], **{**SETTINGS, "max_steps": 1}
        )
        body = {
            **recipe.model_dump(mode="json"),
            "operation": "transform",
            "models": [{"source": f"folder:{_moved(base, n)}"} for n in range(1, count)],
        }
        if not method.needs_data:
            body["data"] = None
        (folder / "recipe.json").write_text(json.dumps(body), encoding="utf-8")
        start = time.perf_counter()
        result = run_folder(folder)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (folder / "artifact").rglob("*.safetensors")) / 1e6
        said = f"{seconds:.1f}" if result["outcome"] == "succeeded" else result["message"][:80]
        section.rows.append((method.card.title, str(count), said, f"{seconds / copying:.0f}", f"{size:.1f}"))
    return section


def task_data(bench: Workbench, task: str) -> str | None:
    """Data of our own for a goal, or None where there is none."""
    from engine.bench.workbench import story_file

    if task == "causal_lm":
        return f"file:{story_file(bench.folder, 400)}"
    if task == "classify":
        return None  # the bench model is a decoder
    path = bench.folder / f"{task}.jsonl"
    if task == "instruct":
        path.write_text("".join(json.dumps(row) + "\n" for row in dialogues(11, 200)), encoding="utf-8")
    elif task == "preference":
        return "starter:village-preferences"
    elif task == "verifiable":
        rows = [
            {"question": f"What is {a} plus {b}?", "answer": str(a + b), "hint": f"Begin with {a}."}
            for a in range(20)
            for b in range(10)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        return None
    return f"file:{path}"


def _plain_task(task: str) -> str:
    return task if task in {"causal_lm", "instruct", "verifiable"} else ""


def _same_slot(slug: str, method: type[TrainMethod]) -> bool:
    other = catalogue()[slug]
    return any(slot.arity == "one" and slot in method.slots for slot in other.slots)


def _common(method: type[TrainMethod]) -> list[tuple[str, dict[str, Any]]]:
    """What stands beside it, less what would be in its way."""
    return [(slug, params) for slug, params in COMMON if not _same_slot(slug, method)]


def _rank(bench: Workbench, model: str, data: str, target: int) -> int:
    probe = bench.run(bench.recipe(model, data, [("lora", {"r": 1, **LORA}), *COMMON], **SETTINGS))
    return min(256, max(1, round(target / probe.trainables.num_elements())))


def _row(slug: str, title: str, run: Run, lora: Run, beside: str) -> tuple[tuple[str, ...], Goal, Goal]:
    """The row of a method, and its goals: time of a step, and bytes saved for backward."""
    timings = interleave({"own": _turn(run), "lora": _turn(lora)}, rounds=ROUNDS)
    ratio, low, high = ratio_interval(timings["own"].seconds, timings["lora"].seconds)
    micro, theirs = run.next_batches()[0], lora.next_batches()[0]
    saved = saved_bytes(lambda: forward(run, micro), run.model) / saved_bytes(lambda: forward(lora, theirs), lora.model)
    state = optimizer_bytes(run.optimizer) / max(1, optimizer_bytes(lora.optimizer))
    own = timings["own"]
    row = (title, f"{run.trainables.num_elements():,}", beside, f"{own.median * 1e3:.1f}", f"{own.spread:.1%}", f"{ratio:.3f}",
           f"{low:.3f} – {high:.3f}", f"{saved:.3f}", f"{state:.3f}")  # fmt: skip
    time = Goal(
        goal=f"step time of {slug}", value=ratio, interval=(low, high), target=STEP_AIM, baseline=f"peft LoRA {beside}"
    )
    kept = Goal(goal=f"bytes saved for backward by {slug}", value=saved, baseline=f"peft LoRA {beside}")
    return row, time, kept


def _turn(run: Run) -> Any:
    micro = run.next_batches()
    made = any(type(policy).gather.__qualname__.partition(".")[0] != "DataPolicy" for policy in run.slots.policies)
    return (lambda: step(run, run.next_batches())) if made else (lambda: step(run, micro))


def _moved(base: Path, number: int) -> Path:
    import shutil

    import torch

    from engine.io.tensors import load_tensors, save_tensors

    folder = base.with_name(f"{base.name}-moved-{number}")
    if not folder.exists():
        shutil.copytree(base, folder)
        generator = torch.Generator().manual_seed(number)
        tensors = load_tensors(folder / "model.safetensors")
        moved = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in sorted(tensors.items())}
        save_tensors(folder / "model.safetensors", moved, metadata={"format": "pt"})
    return folder


def _copy_seconds(folder: Path) -> float:
    from engine.io.tensors import load_tensors, save_tensors

    start = time.perf_counter()
    save_tensors(folder / "copy.safetensors", load_tensors(folder / "model.safetensors"))
    (folder / "copy.safetensors").unlink()
    return time.perf_counter() - start


def measure() -> list[Section]:
    """All four tables."""
    set_threads()
    logging.disable(logging.WARNING)
    bench = Workbench()
    try:
        data = str(task_data(bench, "causal_lm"))
        return [learners(bench, data), halves(bench, data), others(bench), transforms(bench)]
    finally:
        bench.close()


STUDY = Study(name="efficiency", page="efficiency.md", minutes=10, quick=True, seed=17, run=measure)
