"""LST as a method: nothing flows back through the model, what is remembered is counted, the result goes home and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from engine.bench.backward import saved_bytes
from engine.core.errors import EngineError
from engine.io.models import base_of
from engine.methods.lst import LST
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.blocks import blocks_of
from engine.parts.ladder_start import anatomy
from engine.tasks.batching import measuring
from tests.engine.attached import facts_for, parameter_copy, random_batches
from tests.engine.tiny import Tiny, lay, metric_rows
from tests.engine.unit.ladders import (
    DECODERS,
    ENCODERS,
    SIZES,
    attached,
    batches_for,
    described,
    ladder,
    load,
    lst,
    wake,
    zoo,
)
from tests.engine.unit.tiny_models import tiny_tokenizer

# ── nothing flows back through the model ──────────────────────────────────────────────────────────────────────────────


def leaves(loss: Tensor) -> set[int]:
    """The parameters at the ends of the autograd graph of a loss."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_the_graph_of_the_loss_holds_no_parameter_of_the_base(family: str) -> None:
    one = attached(zoo(family))
    one.model.train()
    for parameter in base_of(one.model).parameters():
        parameter.requires_grad_(True)  # even then
    one.model.enable_input_require_grads()  # type: ignore[operator]
    found = leaves(one.loss(next(batches_for(one))))
    mine = {id(parameter) for parameter in one.trainables}
    head = {
        id(p)
        for name in ("lm_head", "classifier")
        if hasattr(one.model, name)
        for p in getattr(one.model, name).parameters()
    }
    pooler = {id(p) for p in getattr(base_of(one.model), "pooler", nn.Identity()).parameters()}
    assert (
        mine <= found and found - mine <= head | pooler
    )  # those stand behind the last state and were made to learn here
    body = {id(p) for name, p in base_of(one.model).named_parameters() if not name.startswith(("ladder.", "pooler."))}
    assert len(body) > 30 and not found & (body - head)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_the_base_stays_bit_identical_and_never_gets_a_gradient(family: str) -> None:
    one = attached(zoo(family))
    before = parameter_copy(one.model)
    one.model.train()
    losses = one.train(iter([next(batches_for(one))] * 12), 12)
    assert losses[-1] < losses[0] - 0.1
    moved = {name for name, tensor in one.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".ladder." in name or name.startswith("classifier") for name in moved)
    assert {
        f"model.ladder.{n}" if family == "Llama" else f"bert.ladder.{n}" for n, _ in ladder(one).named_parameters()
    } <= moved
    for name, parameter in one.model.named_parameters():
        if ".ladder." not in name and not name.startswith("classifier"):
            assert parameter.grad is None and not parameter.requires_grad, name


def test_the_base_stays_in_eval_mode_while_the_side_network_trains() -> None:
    one = attached(zoo("Bert"))
    one.model.train()
    modes = {name: module.training for name, module in one.model.named_modules()}
    inside = {name: mode for name, mode in modes.items() if name.startswith("bert") and "ladder" not in name}
    assert not any(inside.values()) and all(mode for name, mode in modes.items() if ".ladder" in name)
    assert modes["dropout"]  # of the head, which learns
    with measuring(one.model):
        assert not any(module.training for module in one.model.modules())
    assert {name: module.training for name, module in one.model.named_modules()} == modes


def test_no_kernel_runs_backward_inside_the_base() -> None:
    one = attached(zoo("Llama"), dropout=0.0)
    one.model.train()
    loss = one.loss(next(batches_for(one)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss.backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes if shape]
    assert any(25 in shape for shape in shapes)  # the inner width of a side block
    assert not any(100 in shape or 200 in shape for shape in shapes)  # that of a layer of the model


def test_recomputing_activations_gives_the_same_gradients_for_less_memory() -> None:
    one = attached(zoo("Llama"), dropout=0.0)
    wake(one)
    one.model.train()
    batch = next(batches_for(one))
    plain = saved_bytes(lambda: one.loss(batch), one.model)
    one.loss(batch).backward()
    expected = {name: p.grad.clone() for name, p in one.trainables.items() if p.grad is not None}
    assert len(expected) == len(one.trainables)
    for parameter in one.trainables:
        parameter.grad = None
    one.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    assert saved_bytes(lambda: one.loss(batch), one.model) < plain
    one.loss(batch).backward()
    for name, parameter in one.trainables.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


# ── efficiency, counted ───────────────────────────────────────────────────────────────────────────────────────────────


def test_less_is_remembered_than_with_lora_and_with_full_fine_tuning(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 128, "num_hidden_layers": 12, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 4},
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    one = attached(tmp_path, k=8)
    batch = next(random_batches(320, size=8))
    one.model.train()
    ours = saved_bytes(lambda: one.loss(batch), one.model)
    rival = get_peft_model(load(tmp_path), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    lora = saved_bytes(lambda: nn.functional.cross_entropy(*one.task.forward_logits(rival, batch)), rival)
    whole = load(tmp_path).train()
    full = saved_bytes(lambda: nn.functional.cross_entropy(*one.task.forward_logits(whole, batch)), whole)
    print(f"saved for backward: LST {ours:,}, LoRA {lora:,} ({ours / lora:.3f}), full {full:,} ({ours / full:.3f})")
    assert ours < lora < full and ours <= 0.45 * lora
    blocks = sum(p.numel() for p in whole.model.layers.parameters())
    share = one.trainables.num_elements() / blocks
    print(f"trainable: {one.trainables.num_elements():,} of {blocks:,} in the blocks ({share:.2%})")
    assert share < 0.04


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize(
    "params",
    [{}, {"k": 2, "output": "gate", "layers": "every-2nd"}, {"gate": "none", "bias": False}, {"ladders": "last"}],
    ids=str,
)
def test_the_estimate_counts_what_learns(family: str, params: dict[str, Any]) -> None:
    one = attached(zoo(family), **params)
    own = sum(p.numel() for name, p in one.trainables.items() if name.startswith("ladder."))
    assert LST.num_trainable(LST.Params(**{"k": 4, **params}), one.facts) == own
    assert LST.claims(LST.Params(), one.facts) == set(one.facts.model.tensors)


def test_the_estimate_knows_that_nothing_goes_back_through_the_model(tiny: Tiny) -> None:
    lora, ladder_ = (
        check(tiny.recipe([method], max_length=128, batch_size=16)).estimate
        for method in (("lora", {"r": 8, "alpha": 16}), ("lst", LST.presets["tiny"]))
    )
    assert ladder_["memory_bytes"] < lora["memory_bytes"]
    assert ladder_["seconds"] <= lora["seconds"]  # of a model of this size, hardly more than the start


# ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_own_form_restores_on_another_seed(family: str) -> None:
    one = attached(zoo(family), init="fisher")
    wake(one)
    with torch.no_grad():
        ladder(one).rotary.copy_(ladder(one).rotary.flip(0))  # another start than the one that a loader makes
    batches = batches_for(one)
    one.train(batches, 3)
    batch = next(batches)
    payload = one.part.export(one.model)
    assert payload is not None and payload.layout == "bonsai" and not payload.forms
    base = sum(p.numel() for name, p in one.model.named_parameters() if ".ladder." not in name)
    assert sum(tensor.numel() for tensor in payload.tensors.values()) < 0.3 * base
    other = attached(zoo(family), seed=77, init="fisher")
    if family == "Bert":
        nn.init.normal_(other.model.classifier.weight)  # type: ignore[union-attr]
    assert not torch.allclose(other.logits(batch), one.logits(batch), atol=1e-3)
    other.part.restore(other.model, payload)
    assert torch.equal(other.logits(batch), one.logits(batch))
    assert not one.part.merge(one.model) and "merge" in LST.cannot


def test_the_seed_alone_decides_a_random_start() -> None:
    starts = []
    for seed, noise in ((3, 0), (3, 99), (4, 0)):
        torch.manual_seed(noise)
        one = attached(zoo("Llama"), seed=seed, init="random", samplers="random")
        starts.append(torch.cat([p.detach().flatten() for p in one.trainables]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


# ── composition and refusals ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["classify", "causal_lm", "instruct"])
def test_it_runs_beside_other_slots(tiny: Tiny, tmp_path: Path, task: str) -> None:
    recipe = tiny.recipe(
        [("lst", LST.presets["tiny"]), ("clip", {}), ("cosine", {}), ("patience", {}), ("adamw", {"weight_decay": 0.1})],
        task=task, gradient_checkpointing=True, accumulate=2, packing=task == "instruct",
    )  # fmt: skip
    folder = lay(tmp_path / "run", recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result
    assert metric_rows(folder) and (folder / "artifact" / "adapter" / "adapter.safetensors").exists()


@pytest.mark.parametrize("method", [("lst", {"k": 4, "samples": 4}), ("lora", {"r": 4})], ids=["lst", "lora"])
def test_a_new_classifier_on_a_bf16_model_goes_home(tiny: Tiny, tmp_path: Path, method: Any) -> None:
    folder = lay(tmp_path / "run", tiny.recipe([method], task="classify", precision="bf16", max_steps=2))
    assert run_folder(folder)["outcome"] == "succeeded"
    assert json.loads((folder / "artifact" / "certificate.json").read_text())["ok"]


@pytest.mark.parametrize("other", ["lora", "full-finetuning"])
def test_nothing_else_may_learn_inside_the_model(tiny: Tiny, other: str) -> None:
    recipe = tiny.recipe([("lst", LST.presets["tiny"])])
    both = recipe.model_copy(update={"methods": (*recipe.methods, tiny.recipe([(other, {})]).methods[0])})
    (fault,) = [fault for fault in check(both).faults if fault.code == "claimed_twice"]
    assert "Ladder side network" in fault.what and fault.way_out.startswith("Remove one of the two")


def test_a_stray_parameter_that_wants_to_learn_is_an_error() -> None:
    one = attached(zoo("Llama"))
    part = lst().parts(one.ctx)[0]
    one.model.model.norm.weight.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(EngineError, match="is meant to learn"):
        part.sync(one.model)


def test_what_does_not_fit_is_refused_with_a_way_out() -> None:
    def faults(family: str, **params: Any) -> Any:
        return LST.check(LST.Params(**params), facts_for(described(zoo(family)), "classify"))

    (fault,) = faults("Llama", k=16)  # heads of 16 numbers: one would be left, and positions turn pairs
    assert fault.where == "k" and "even" in fault.why and fault.way_out == "Choose one of: 1, 2, 4, 8."
    assert not faults("Bert", k=16) and not faults("Llama", k=8)
    (fault,) = faults("Bert", k=3)
    assert "64" in fault.why and "even" not in fault.why
    for spec, words in (("1, seven", "'seven'"), ("0, 4", "layer 4"), (" ", "none is named")):
        (fault,) = faults("Bert", k=4, layers=spec)
        assert fault.where == "layers" and words in fault.what and "0 to 3" in fault.why
    assert not faults("Bert", k=4, layers="3-of-4")
    one_layer = facts_for(replace(described(zoo("Bert")), num_layers=1), "classify")
    assert [fault.way_out for fault in LST.check(LST.Params(k=4, layers="every-2nd"), one_layer)] == ["Write all."]
    verdict = LST.supports(facts_for(replace(described(zoo("Llama")), family="gpt2"), "causal_lm"))
    assert not verdict.ok and "gpt2" in verdict.why and verdict.way_out.endswith(".")


def test_k_is_suggested_from_the_heads(tiny: Tiny) -> None:
    recipe = tiny.recipe([("lst", {"samples": 4})])
    assert recipe.methods[0].params["k"] == 4  # heads of 8 numbers, and an even number must be left
    one = attached(zoo("Bert"))
    advice = {item.where: item for item in LST.suggest(one.ctx.recipe, LST.Params(), one.facts)}
    assert advice["methods[0].params.k"].value == 8 and advice["settings.learning_rate"].value > 0
    assert anatomy(one.model.config).legal(8) == [1, 2, 4, 8] and len(blocks_of(base_of(one.model)).blocks) == 4 + 4
