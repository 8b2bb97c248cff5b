"""The estimate of memory against what autograd keeps, and what is settled by it: recomputing and parking activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import engine.ops.check as checking
from engine.bench.backward import saved_bytes as measured_bytes
from engine.core.compose import compose
from engine.core.control import Control
from engine.core.errors import RecipeError
from engine.core.events import EventLog
from engine.core.facts import MachineFacts
from engine.core.recipe import Recipe, TrainSettings, parse_recipe
from engine.ops.check import check, require
from engine.ops.estimate import choose_memory, estimate, largest_batch, saved_bytes, weight_bytes
from engine.ops.folder import run_folder
from engine.ops.train import prepare
from engine.train.run import Run
from tests.engine.tiny import Tiny, lay, metric_rows

FACTOR = 1.5
GB = 10**9


@pytest.fixture(scope="module")
def shapes(tiny: Tiny) -> dict[str, Path]:
    """A Llama with grouped keys, and a BERT of the shape of MiniLM."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder / "decoder")
    same: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    llama = transformers.LlamaConfig(hidden_size=96, num_hidden_layers=4, intermediate_size=256, num_attention_heads=6, num_key_value_heads=2,
                                     max_position_embeddings=128, bos_token_id=1, eos_token_id=2, **same)  # fmt: skip
    mini = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_attention_heads=12, **same
    )
    found = {}
    for name, kind, config in (
        ("llama", transformers.LlamaForCausalLM, llama),
        ("minilm", transformers.BertModel, mini),
    ):
        torch.manual_seed(0)
        kind(config).save_pretrained(tiny.folder / name)
        tokenizer.save_pretrained(tiny.folder / name)
        found[name] = tiny.folder / name
    return found


def on(folder: Path, recipe: Recipe) -> Recipe:
    body = recipe.model_dump(mode="json")
    return require(parse_recipe({**body, "model": {"source": f"folder:{folder}"}})).recipe


def ready(recipe: Recipe, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    run.model.train()
    run.begin()
    return run


def largest(run: Run) -> dict[str, torch.Tensor]:
    """The largest micro-batch of a pass over the data."""
    micro = [batch for _ in range(run.clock.steps_per_epoch) for batch in run.next_batches()]
    return max(micro, key=lambda batch: batch["input_ids"].numel())


def kept_for_backward(recipe: Recipe, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    run = ready(recipe, folder)
    batch = largest(run)
    return float(measured_bytes(lambda: run.objective.loss(run.model, batch, run.rng).total, run.model)), batch


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 8}),
    ("lora", {"r": 8, "top_blocks": 2}),
    ("paca", {"r": 8}),
    ("bias-norm-tuning", {}),
    ("full-finetuning", {}),
    ("hft", {}),
    ("lst", {"k": 2, "samples": 2}),
]


@pytest.mark.parametrize("again", ["off", "on"])
@pytest.mark.parametrize(
    ("task", "model", "packing"),
    [
        ("causal_lm", "llama", True),
        ("instruct", "llama", True),
        ("instruct", "llama", False),
        ("preference", "llama", False),
        ("classify", "minilm", False),
    ],
)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_estimate_is_near_what_autograd_keeps(
    method: tuple[str, dict[str, Any]],
    task: str,
    model: str,
    packing: bool,
    again: str,
    tiny: Tiny,
    shapes: dict[str, Path],
    tmp_path: Path,
) -> None:
    recipe = on(
        shapes[model], tiny.recipe([method], task=task, packing=packing, gradient_checkpointing=again, max_length=64)
    )
    checked = require(recipe)
    assert checked.facts is not None
    guess = saved_bytes(checked.recipe, checked.composition, checked.facts)
    kept, batch = kept_for_backward(recipe, tmp_path / "run")
    if again == "on":  # one block at a time remembers as much as it would without recomputing
        without = recipe.settings.model_copy(update={"gradient_checkpointing": "off"})
        whole, _ = kept_for_backward(recipe.model_copy(update={"settings": without}), tmp_path / "without")
        kept += (whole - kept) / method[1].get("top_blocks", checked.facts.model.num_layers)
    # Characters tell tokens only roughly, and that is not what is tested here: the guess is scaled to the true number of places.
    guess *= batch["input_ids"].numel() / largest_batch(checked.recipe, checked.composition, checked.facts).total
    assert kept / FACTOR <= guess <= kept * FACTOR, (kept, guess, guess / kept)


def test_attempts_that_are_written_together_are_counted(tiny: Tiny) -> None:
    few, many = (
        require(
            tiny.recipe(
                [("lora", {"r": 2}), ("grpo", {"k": k, "max_new_tokens": 32, "answers_at_a_time": 4096})],
                task="verifiable",
            )
        )
        for k in (4, 64)
    )
    assert few.facts is not None
    more = weight_bytes(many.recipe, many.composition, few.facts) - weight_bytes(few.recipe, few.composition, few.facts)
    longest = largest_batch(few.recipe, few.composition, few.facts).longest
    assert (
        more == 4 * (64 - 4) * longest * 2 * 2 * 32 * 4
    )  # examples, attempts, tokens, layers, keys and values, width, bytes


def on_machine(recipe: Recipe, have: float, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> checking.Checked:
    machine = MachineFacts(
        device=device, device_name="This machine", memory_bytes=int(have), num_threads=2, has_bf16=False
    )
    monkeypatch.setattr(checking, "machine_facts", lambda: machine)
    return check(recipe)


def needs(recipe: Recipe, **settings: Any) -> int:
    checked = require(recipe)
    assert checked.facts is not None
    tried = recipe.model_copy(update={"settings": recipe.settings.model_copy(update=settings)})
    return int(estimate(tried, checked.composition, checked.facts)["memory_bytes"])


def open_recipe(tiny: Tiny, folder: Path, **settings: Any) -> Recipe:
    plan = {"max_length": 128, "batch_size": 512, "precision": "fp32", **settings}
    source = {"source": f"folder:{folder}"}
    return parse_recipe(
        {
            **tiny.inputs("causal_lm"),
            "model": source,
            "methods": [{"slug": "lora", "params": {"r": 2}}],
            "settings": plan,
        }
    )


def test_activations_are_recomputed_only_when_the_run_would_not_fit_otherwise(
    tiny: Tiny, shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = open_recipe(tiny, shapes["llama"])
    whole, again = needs(recipe, gradient_checkpointing="off"), needs(recipe, gradient_checkpointing="on")
    assert again < 0.7 * whole
    ample = on_machine(recipe, 2 * whole, monkeypatch)
    assert ample.recipe.settings.gradient_checkpointing == ample.recipe.settings.activation_offload == "off"
    assert not [advice for advice in ample.suggestions if "gradient_checkpointing" in advice.where]
    short = on_machine(recipe, 0.9 * whole, monkeypatch)
    assert (
        short.recipe.settings.gradient_checkpointing == "on"
        and short.recipe.settings.activation_offload == "off"
        and not short.faults
    )
    (advice,) = [advice for advice in short.suggestions if advice.where == "settings.gradient_checkpointing"]
    assert f"about {whole / GB:.1f} GB" in advice.reason and "This machine has" in advice.reason
    told = on_machine(open_recipe(tiny, shapes["llama"], gradient_checkpointing="off"), 0.9 * whole, monkeypatch)
    assert told.recipe.settings.gradient_checkpointing == "off" and [fault.code for fault in told.faults] == [
        "out_of_memory"
    ]


def test_activations_are_parked_only_on_a_gpu_where_recomputing_is_not_enough(
    tiny: Tiny, shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = open_recipe(tiny, shapes["llama"])
    again = needs(recipe, gradient_checkpointing="on")
    parked = on_machine(recipe, 0.95 * again, monkeypatch, device="cuda").recipe.settings
    assert (parked.gradient_checkpointing, parked.activation_offload) == ("on", "on")
    cpu = on_machine(recipe, 0.95 * again, monkeypatch)
    assert cpu.recipe.settings.activation_offload == "off"
    (refused,) = on_machine(open_recipe(tiny, shapes["llama"], activation_offload="on"), 1e12, monkeypatch).faults
    assert refused.code == "no_other_memory" and refused.where == "settings.activation_offload"
    wanted = open_recipe(tiny, shapes["llama"], activation_offload="on", gradient_checkpointing="off")
    (refused,) = on_machine(wanted, 1e12, monkeypatch, device="cuda").faults
    assert refused.code == "needs_recomputing"


def test_recomputing_is_not_chosen_where_it_saves_nothing(tiny: Tiny) -> None:
    recipe = tiny.recipe([("full-finetuning", {"top_blocks": 0})], task="classify")
    checked = require(recipe)
    assert checked.facts is not None
    small = replace(checked.facts, machine=replace(checked.facts.machine, memory_bytes=1))
    left = recipe.model_copy(update={"settings": recipe.settings.model_copy(update={"gradient_checkpointing": "auto"})})
    filled, advice = choose_memory(left, compose(left)[0], small)
    assert filled.settings.gradient_checkpointing == "off" and not advice


def test_recipes_that_say_yes_or_no_keep_working() -> None:
    assert TrainSettings.model_validate({"gradient_checkpointing": True}).gradient_checkpointing == "on"
    assert TrainSettings.model_validate({"gradient_checkpointing": False}).gradient_checkpointing == "off"
    with pytest.raises(RecipeError, match="not one of the choices"):
        parse_recipe(
            {"task": "classify", "model": {"source": "starter:x"}, "settings": {"gradient_checkpointing": "maybe"}}
        )


@pytest.mark.parametrize("task", ["causal_lm", "classify"])
def test_fifty_steps_with_recomputing_learn_the_same(task: str, tiny: Tiny, tmp_path: Path) -> None:
    plain, again = (
        lay(
            tmp_path / mode,
            tiny.recipe(
                [("lora", {"r": 4}), ("clip", {})],
                task=task,
                epochs=30,
                max_steps=50,
                evaluations=1,
                gradient_checkpointing=mode,
            ),
        )
        for mode in ("off", "on")
    )
    assert run_folder(plain)["outcome"] == run_folder(again)["outcome"] == "succeeded"
    for one, other in zip(metric_rows(plain), metric_rows(again), strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-4
