"""Frozen lower blocks: nothing is kept for backward there, their states are computed once, and the numbers stay those of the plain path."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.bench.workbench import Workbench, random_llama, step, story_file
from engine.core.control import Control, write_request
from engine.core.errors import RecipeError
from engine.core.events import EventLog
from engine.core.method import TrainMethod
from engine.core.recipe import Recipe
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.io.models import base_of
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.ops.train import prepare
from engine.tasks.batching import measuring
from engine.train import checkpoint
from engine.train.frozen import FILE, FrozenStates, bottom_of, stack_of
from engine.train.run import Run
from tests.engine.tiny import Tiny, events, lay, metric_rows

TOP: list[tuple[str, dict[str, Any]]] = [("lora", {"r": 4, "top_blocks": 1}), ("clip", {})]
TASKS = ("causal_lm", "instruct", "preference", "classify")
LEARNERS = [m for m in catalogue().values() if issubclass(m, TrainMethod) and Slot.PARAMETRIZATION in m.slots]


def ready(recipe: Recipe, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    run.model.train()
    return run


def told(folder: Path) -> list[str]:
    return [
        event["message"]
        for event in events(folder, "log")
        if "frozen part" in event["message"] or "Nothing learns in" in event["message"]
    ]


# ── autograd below the lowest thing that learns ───────────────────────────────────────────────────────────────────────


def kept_below(run: Run) -> tuple[int, int]:
    """(the lowest block that autograd follows, bytes that a training pass keeps for backward before it is reached)."""
    bottom = bottom_of(run.model, run.encoded.train[0].token_rows()[0], run.autocast)
    assert stack_of(base_of(run.model)) is not None
    if bottom is None:
        return 0, 0
    weights = {t.untyped_storage().data_ptr() for t in (*run.model.parameters(), *run.model.buffers())}
    reached, kept = [False], []

    def pack(tensor: Tensor) -> Tensor:
        if not reached[0] and tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor.nbytes)
        return tensor

    last = bottom.stack[bottom.blocks - 1]
    handle = last.register_forward_hook(lambda *_: reached.__setitem__(0, True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.objective.loss(run.model, run.next_batches()[0], run.rng)
    handle.remove()
    assert reached[0]
    return bottom.blocks, sum(kept)


@pytest.mark.parametrize("again", ["off", "on"])
@pytest.mark.parametrize("task", ["causal_lm", "classify"])
@pytest.mark.parametrize("method", LEARNERS, ids=[m.card.slug for m in LEARNERS])
def test_nothing_is_kept_for_backward_below_the_lowest_thing_that_learns(
    method: type[TrainMethod], task: str, again: str, tiny: Tiny, tmp_path: Path
) -> None:
    if method.needs.tasks and task not in method.needs.tasks:
        return
    params = dict(method.presets["tiny"])
    if "top_blocks" in method.Params.model_fields:
        params["top_blocks"] = 1
    try:
        recipe = tiny.recipe([(method.card.slug, params)], task=task, gradient_checkpointing=again)
    except RecipeError as refused:
        assert {fault.code for fault in refused.faults} == {"does_not_fit"}
        return
    blocks, kept = kept_below(ready(recipe, tmp_path / "run"))
    assert kept == 0
    assert blocks >= 1 or "top_blocks" not in method.Params.model_fields


# ── the states ────────────────────────────────────────────────────────────────────────────────────────────────────────


def filled(run: Run, folder: Path) -> FrozenStates:
    rows = [row for example in run.encoded.train for row in example.token_rows()]
    texts = [piece for row in rows for piece in run.task.pieces(row, run.tokenizer)]
    bottom = bottom_of(run.model, texts[0], run.autocast)
    assert bottom is not None
    states = FrozenStates(bottom, frozenset(), in_training=True)
    states.fill(texts, folder / FILE, run.autocast)
    return states


@pytest.mark.parametrize("task", TASKS)
def test_states_of_a_batch_are_what_the_blocks_answer(task: str, tiny: Tiny, tmp_path: Path) -> None:
    run = ready(tiny.recipe(TOP, task=task, batch_size=5), tmp_path / "run")
    states = filled(run, tmp_path)
    assert not (tmp_path / FILE).exists(), "the file has no name while it is read, so that nothing stays behind"
    run.begin()
    body, seen, given = base_of(run.model), [], []
    block = states.bottom.stack[states.bottom.blocks - 1]
    hear = block.register_forward_hook(lambda module, args, output: seen.append(output))
    note = body.register_forward_pre_hook(lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with measuring(run.model):
        for batch in run.next_batches():
            run.objective.loss(run.model, batch, run.rng)
    hear.remove(), note.remove()
    assert seen
    for plain, (args, kwargs) in zip(seen, given, strict=True):
        inputs = {**dict(zip(["input_ids"], args, strict=False)), **kwargs}
        found = states.lookup(inputs)
        assert found is not None
        real = found[states.bottom.blocks - 1].abs().sum(-1) > 0  # padding is zero
        mask = inputs["attention_mask"]
        assert int(real.sum()) == (int(mask.sum()) if mask.dim() == 2 else inputs["input_ids"].numel())
        torch.testing.assert_close(found[states.bottom.blocks - 1][real], plain[real], rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_not_known_or_not_understood_runs_through_every_block(tiny: Tiny, tmp_path: Path) -> None:
    run = ready(tiny.recipe(TOP), tmp_path / "run")
    states = filled(run, tmp_path)
    ids = torch.tensor([run.encoded.train[0].input_ids])
    ones = torch.ones_like(ids)
    assert states.lookup({"input_ids": ids, "attention_mask": ones, "use_cache": False}) is not None
    assert states.lookup({"input_ids": ids.flip(1), "attention_mask": ones}) is None
    assert states.lookup({"input_ids": ids, "attention_mask": ones, "use_cache": True}) is None
    assert states.lookup({"input_ids": ids, "attention_mask": ones, "past_key_values": object()}) is None
    left = torch.cat([torch.zeros(1, 1, dtype=torch.long), ones], 1)
    assert states.lookup({"input_ids": torch.cat([ids[:, :1], ids], 1), "attention_mask": left}) is None, (
        "it stands at the right"
    )
    assert states.lookup({"input_ids": ids, "attention_mask": ones, "position_ids": ones.cumsum(1)}) is None, (
        "positions begin at one"
    )


def test_only_blocks_above_run_in_a_step_and_all_of_them_afterwards(tiny: Tiny, tmp_path: Path) -> None:
    run = ready(tiny.recipe(TOP, epochs=4, max_steps=40), tmp_path / "run")
    stack = stack_of(base_of(run.model))
    assert stack is not None
    ran = dict.fromkeys(range(len(stack)), 0)
    for place, block in enumerate(stack):
        block.self_attn.register_forward_hook(lambda *_, place=place: ran.__setitem__(place, ran[place] + 1))
    with run.remembering():
        assert run.frozen is not None
        before = dict(ran)
        run.evaluate()
        run.update_rule.update(run, run.next_batches())
        assert ran[0] == before[0] and ran[1] > before[1]
    before = dict(ran)
    run.evaluate()
    assert ran[0] > before[0] and "forward" not in vars(stack[0])


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["causal_lm", "instruct", "preference"])
def test_fifty_steps_learn_the_same(task: str, tiny: Tiny, tmp_path: Path) -> None:
    plain, served = (
        lay(
            tmp_path / mode, tiny.recipe(TOP, task=task, epochs=20, max_steps=50, learning_rate=1e-3, frozen_cache=mode)
        )
        for mode in ("off", "auto")
    )
    assert run_folder(plain)["outcome"] == run_folder(served)["outcome"] == "succeeded"
    assert not told(plain) and "are left out from now on" in told(served)[0]
    for one, other in zip(metric_rows(plain), metric_rows(served), strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-4
    for one, other in zip(events(plain, "evaluation"), events(served, "evaluation"), strict=True):
        assert abs(one["eval_loss"] - other["eval_loss"]) <= 1e-4
    assert not list(served.glob("*frozen*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stop_and_resume_in_the_second_pass_equals_uninterrupted_bit_for_bit(
    precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = tiny.recipe(TOP, epochs=3, max_steps=24, checkpoint_every=5, precision=precision)
    whole, killed = lay(tmp_path / "whole", recipe), lay(tmp_path / "killed", recipe)
    for folder in (whole, killed):
        assert run_folder(folder)["outcome"] == "succeeded"
    assert "are left out from now on" in told(whole)[0]
    while checkpoint.listed(killed)[-1].name > "step-00000020":
        shutil.rmtree(checkpoint.listed(killed)[-1])
    shutil.rmtree(killed / "artifact")
    assert run_folder(killed)["outcome"] == "succeeded"
    mine, theirs = (checkpoint.load(checkpoint.listed(folder)[-1]) for folder in (whole, killed))
    assert all(torch.equal(mine.trainables[name], theirs.trainables[name]) for name in theirs.trainables)
    assert metric_rows(whole) == metric_rows(killed)


def test_dropout_below_keeps_training_as_it_is_unless_it_is_switched_on(tiny: Tiny, tmp_path: Path) -> None:
    rows, said = {}, {}
    for mode in ("off", "auto", "on"):
        folder = lay(tmp_path / mode, tiny.recipe(TOP, task="classify", epochs=4, max_steps=30, frozen_cache=mode))
        assert run_folder(folder)["outcome"] == "succeeded"
        rows[mode], said[mode] = [row["loss"] for row in metric_rows(folder)], told(folder)
    assert rows["auto"] == rows["off"] and "whenever it is measured" in said["auto"][0]
    assert rows["on"] != rows["off"] and "from now on" in said["on"][0]


@pytest.mark.parametrize(
    ("methods", "why"),
    [
        ([("lora", {"r": 2})], "learns in the first block"),
        ([("said", {}), ("clip", {})], "said may read or change"),
    ],
)  # fmt: skip
def test_it_says_why_it_does_not_remember(methods: Any, why: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(
        tmp_path,
        tiny.recipe(
            [(slug, {**catalogue()[slug].presets["tiny"], **params}) for slug, params in methods],
            frozen_cache="on",
            max_steps=2,
        ),
    )
    assert run_folder(folder)["outcome"] == "succeeded"
    assert why in told(folder)[0] and "Each step runs the whole model." in told(folder)[0]


def test_a_full_disk_is_said_and_the_run_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    folder = lay(tmp_path, tiny.recipe(TOP, epochs=4))
    assert run_folder(folder)["outcome"] == "succeeded"
    assert "No space left on device" in told(folder)[0] and not (folder / FILE).exists()


def test_one_pass_over_the_data_computes_nothing_ahead_but_what_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(TOP, epochs=1, max_steps=4))
    run_folder(folder)
    assert "whenever it is measured" in told(folder)[0]


def test_a_model_whose_upper_blocks_read_more_than_the_state_is_found_out(tiny: Tiny, tmp_path: Path) -> None:
    run = ready(tiny.recipe(TOP), tmp_path / "run")
    stack = stack_of(base_of(run.model))
    assert stack is not None
    texts = [run.task.pieces(example.input_ids, run.tokenizer)[0] for example in run.encoded.train[:2]]
    assert filled(run, tmp_path).agrees(texts, run.autocast)
    heard: list[Tensor] = []
    stack[0].self_attn.register_forward_hook(lambda module, args, output: heard.append(output[0].detach().mean()))

    def sum_with_below(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + (heard.pop() if heard else 0.0), *output[1:])

    stack[1].self_attn.register_forward_hook(sum_with_below)
    assert not filled(run, tmp_path).agrees(texts, run.autocast)


def test_a_request_to_pause_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(TOP, epochs=4))
    write_request(folder, "pause")
    assert run_folder(folder)["outcome"] == "paused" and not list(folder.glob("*frozen*"))


def test_steps_of_the_top_half_are_cheaper(tmp_path: Path) -> None:
    """The study frozen-half measures how much; in processor time, and far below what it finds."""
    bench = Workbench()
    try:
        model, data = random_llama(bench.folder, hidden=192, layers=6, ffn=512, heads=6), story_file(bench.folder, 60)
        runs = {}
        for mode in ("off", "auto"):
            settings = {
                "learning_rate": 1e-4,
                "epochs": 4,
                "batch_size": 4,
                "max_length": 128,
                "precision": "fp32",
                "frozen_cache": mode,
            }
            runs[mode] = bench.run(
                bench.recipe(f"folder:{model}", f"file:{data}", [("lora", {"r": 4, "top_blocks": 3})], **settings)
            )
        with runs["auto"].remembering():
            taken: dict[str, list[float]] = {"off": [], "auto": []}
            for _ in range(6):
                for mode, run in runs.items():
                    micro, start = run.next_batches(), time.process_time()
                    step(run, micro)
                    taken[mode].append(time.process_time() - start)
        ratio = statistics.median(a / b for a, b in list(zip(taken["off"], taken["auto"], strict=True))[1:])
        assert ratio > 1.07
    finally:
        bench.close()
