"""MaskLoRA, LoRA-Prune and ScaleLoRA share their layer: gradients against dense autograd, zeros, merges and counted memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.bench.backward import saved_bytes
from engine.core.errors import EngineError
from engine.core.recipe import MethodRef
from engine.io.facts import model_facts
from engine.io.tensors import load_tensors
from engine.methods.lora import LoRA
from engine.methods.masklora import MaskLoRA
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.ops.transform import transform
from engine.parts.masked import MaskedLinear, output_layer, start_factors
from engine.parts.pruning import load_masks, prunable, unpack_bits
from engine.train.trainables import halve_frozen, optimizer_bytes
from tests.engine.attached import Attached, facts_for, logits_of, parameter_copy, random_batches
from tests.engine.tiny import Tiny, lay


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    transform("magnitude-pruning", {"sparsity": 0.6}, [tiny.folder / "decoder"], out)
    return out


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def attach(folder: Path, method: Any = None, **changes: Any) -> Attached:
    facts = facts_for(model_facts(f"folder:{folder}", task="causal_lm"), "causal_lm")
    return Attached(decoder(folder), method or MaskLoRA(MaskLoRA.Params(**{"r": 4, "alpha": 8, **changes})), facts)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def zero_pattern(model: nn.Module, names: Any) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() == 0 for name in names}


# ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("when", ["always", "merge"])
@pytest.mark.parametrize("training", [True, False])
def test_the_start_is_the_pruned_model_bit_for_bit(pruned: Path, when: str, training: bool) -> None:
    attached, batch = attach(pruned, when=when), next(random_batches(400))
    attached.model.train(training)
    expected = logits_of(decoder(pruned), batch)
    with torch.no_grad():
        assert torch.equal(attached.model(input_ids=batch["input_ids"]).logits, expected)


def test_the_mask_is_that_of_pruning(pruned: Path) -> None:
    attached = attach(pruned)
    layers = masked_layers(attached.model)
    assert layers.keys() == prunable(attached.facts.model).keys()
    stored = load_masks(pruned, {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers.items()})
    for name, layer in layers.items():
        assert layer.mask is not None and torch.equal(layer.mask, stored[f"{name}.weight"])
        assert int((~layer.mask).sum()) == int(0.6 * layer.mask.numel() + 0.5)


# ── the gradient ──────────────────────────────────────────────────────────────────────────────────────────────────────


def one_layer(kind: Any, *, when: Any = "always", seed: int = 0) -> tuple[MaskedLinear, Tensor]:
    g = torch.Generator().manual_seed(seed)
    plain = nn.Linear(12, 9).double()
    mask = torch.rand(9, 12, generator=g) > 0.6
    plain.weight.data.mul_(mask)
    a = torch.randn(3, 12, generator=g, dtype=torch.float64)
    b = torch.randn(9, 3, generator=g, dtype=torch.float64)
    return MaskedLinear(plain, mask, a, b, kind=kind, scale=1.7 if kind == "add" else 1.0, when=when), mask


@pytest.mark.parametrize(("kind", "when"), [("add", "always"), ("add", "merge"), ("scale", "always")])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12), (12,)])
def test_gradients_equal_dense_autograd(kind: str, when: str, shape: tuple[int, ...]) -> None:
    layer, mask = one_layer(kind, when=when)
    layer.train()
    g = torch.Generator().manual_seed(9)
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    layer(x).sin().sum().backward()
    mine = (x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.bias.grad)
    z = x.detach().clone().requires_grad_()
    a, b, bias = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.bias))
    product = b @ a
    weight = layer.weight.detach()
    if kind == "scale":
        dense = weight * product
    else:
        dense = weight + 1.7 * (product * mask if when == "always" else product)
    (z @ dense.T + bias).sin().sum().backward()
    for ours, theirs in zip(mine, (z.grad, a.grad, b.grad, bias.grad), strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs)
    assert layer.weight.grad is None


def test_gradient_checkpointing_gives_the_same_gradients(pruned: Path) -> None:
    attached, batch = attach(pruned), next(random_batches(400))
    attached.train(random_batches(400), 2)
    attached.model.train()
    attached.loss(batch).backward()
    expected = [parameter.grad.clone() for parameter in attached.trainables if parameter.grad is not None]
    for parameter in attached.trainables:
        parameter.grad = None
    attached.model.gradient_checkpointing_enable({"use_reentrant": False})
    attached.loss(batch).backward()
    assert len(expected) == len(attached.trainables)
    assert all(torch.equal(p.grad, e) for p, e in zip(attached.trainables, expected, strict=True))


# ── what is remembered ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["add", "scale"])
def test_one_layer_remembers_its_input_alone(kind: str) -> None:
    layer, _ = one_layer(kind)
    x = torch.randn(4, 10, 12, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: layer(x).sum(), layer) == x.numel() * 8
    mask, a, b = layer.mask, layer.lora_A, layer.lora_B

    def naive() -> Tensor:
        return nn.functional.linear(x, layer.weight + 1.7 * mask * (b @ a), layer.bias).sum()

    assert saved_bytes(naive, layer) >= x.numel() * 8 + layer.weight.numel() * 8  # a wide product per layer


def test_a_model_remembers_no_more_than_with_lora(pruned: Path) -> None:
    from peft import LoraConfig, get_peft_model

    attached, batch = attach(pruned), next(random_batches(400, size=8))
    partner = get_peft_model(
        decoder(pruned), LoraConfig(r=4, lora_alpha=8, target_modules=list(attached.facts.model.linears))
    )
    partner.train(), attached.model.train()
    ours = saved_bytes(lambda: attached.loss(batch), attached.model)
    theirs = saved_bytes(lambda: nn.functional.cross_entropy(*attached.task.forward_logits(partner, batch)), partner)
    assert ours <= theirs, (ours, theirs)
    trained = sum(p.numel() for p in partner.parameters() if p.requires_grad)
    assert attached.trainables.num_elements() == trained == MaskLoRA.num_trainable(MaskLoRA.Params(r=4), attached.facts)


def test_the_optimizer_holds_two_numbers_for_each_that_learns(pruned: Path) -> None:
    attached = attach(pruned)
    optimizer = torch.optim.AdamW(list(attached.trainables), lr=1e-3)
    attached.loss(next(random_batches(400))).backward()
    optimizer.step()
    steps = 4 * len(attached.trainables)
    assert optimizer_bytes(optimizer) == 8 * attached.trainables.num_elements() + steps


# ── zeros and merges ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("when", ["always", "merge"])
def test_zeros_stay_and_merged_equals_what_was_measured(pruned: Path, when: str) -> None:
    attached = attach(pruned, when=when)
    names = list(masked_layers(attached.model))
    before = zero_pattern(decoder(pruned), names)
    attached.model.train()
    attached.train(random_batches(400), 6)
    batch = next(random_batches(400, seed=5))
    measured = attached.logits(batch)
    assert attached.part.merge(attached.model) and not masked_layers(attached.model)
    torch.testing.assert_close(attached.logits(batch), measured, rtol=0, atol=1e-5)
    after = zero_pattern(attached.model, names)
    for name in names:
        assert type(attached.model.get_submodule(name)) is nn.Linear
        assert torch.equal(after[name], before[name]), name
    assert not torch.allclose(measured, logits_of(decoder(pruned), batch), atol=1e-2)


def test_lora_prune_trains_another_model_than_it_keeps(pruned: Path) -> None:
    """The card's counter-example: what runs in training is not what the merged sparse model does."""
    attached, batch = attach(pruned, when="merge"), next(random_batches(400, seed=5))
    attached.model.train()
    attached.train(random_batches(400), 6)
    with torch.no_grad():
        in_training = attached.model(input_ids=batch["input_ids"]).logits
    assert (in_training - attached.logits(batch)).abs().max() > 1e-2


def test_plain_lora_on_a_pruned_model_loses_its_zeros_or_its_learning(pruned: Path) -> None:
    attached = attach(pruned, LoRA(LoRA.Params(r=4, alpha=8)))
    attached.train(random_batches(400), 6)
    batch = next(random_batches(400, seed=5))
    unmerged = attached.logits(batch)
    assert attached.part.merge(attached.model)
    names = list(prunable(attached.facts.model))
    before = zero_pattern(decoder(pruned), names)
    assert all(bool((attached.model.get_submodule(name).weight[before[name]] != 0).any()) for name in names)
    for name in names:
        attached.model.get_submodule(name).weight.data[before[name]] = 0.0
    assert (attached.logits(batch) - unmerged).abs().max() > 1e-2


def test_a_kept_weight_that_is_zero_learns_and_a_removed_one_does_not(tiny: Tiny, pruned: Path) -> None:
    layer, mask = one_layer("add")
    place = mask.nonzero()[0]
    layer.weight.data[tuple(place)] = 0.0  # kept, and exactly zero
    assert layer.merged()[tuple(place)] != 0 and not layer.merged()[~mask].any()


def test_other_weights_never_move(pruned: Path) -> None:
    attached = attach(pruned)
    before = parameter_copy(attached.model)
    attached.train(random_batches(400), 3)
    for name, tensor in attached.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.rpartition(".")[2].startswith("lora_"), name


# ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_export_and_restore_with_the_mask(pruned: Path) -> None:
    attached = attach(pruned)
    attached.train(random_batches(400), 3)
    payload = attached.part.export(attached.model)
    assert payload is not None and payload.layout == "bonsai"
    for name, layer in masked_layers(attached.model).items():
        assert layer.mask is not None
        assert torch.equal(unpack_bits(payload.tensors[f"{name}.mask"], layer.mask.shape), layer.mask)
    assert payload.config["density"] == pytest.approx(0.4, abs=1e-3)
    other = attach(pruned)
    other.part.restore(other.model, payload)
    batch = next(random_batches(400, seed=5))
    assert torch.equal(other.logits(batch), attached.logits(batch))


def test_a_file_of_another_pruning_is_refused(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    transform("magnitude-pruning", {"score": "random", "sparsity": 0.6}, [tiny.folder / "decoder"], tmp_path / "other")
    payload = attach(pruned).part.export(attach(pruned).model)
    other = attach(tmp_path / "other")
    with pytest.raises(EngineError, match="another pruning"):
        other.part.restore(other.model, payload)


def job(tiny: Tiny, pruned: Path, methods: list[tuple[str, dict[str, Any]]], folder: Path, **settings: Any) -> Path:
    recipe = tiny.recipe(methods, **settings)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": f"folder:{pruned}"})})
    return lay(folder, recipe)


def test_a_whole_run_exports_the_same_zeros_and_a_certificate(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """Beside slots that MaskLoRA does not claim: clipping, a cosine, a watcher, and norms that learn."""
    methods: list[tuple[str, dict[str, Any]]] = [
        ("masklora", {"r": 4, "alpha": 8}), ("bias-norm-tuning", {}), ("clip", {}), ("cosine", {}), ("patience", {}),
    ]  # fmt: skip
    folder = job(tiny, pruned, methods, tmp_path / "job")
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"], certificate["sentence"]
    before, after = (load_tensors(f / "model.safetensors") for f in (pruned, folder / "artifact" / "merged"))
    for name, shape in prunable(model_facts(f"folder:{pruned}", task="causal_lm")).items():
        assert shape and torch.equal(after[f"{name}.weight"] == 0, before[f"{name}.weight"] == 0), name
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_an_encoder_learns_to_classify_under_its_mask(tiny: Tiny, tmp_path: Path) -> None:
    transform("magnitude-pruning", {"pattern": "2:4"}, [tiny.folder / "encoder"], tmp_path / "sparse")
    recipe = tiny.recipe([("masklora", {"r": 4})], task="classify")
    source = recipe.model.model_copy(update={"source": f"folder:{tmp_path / 'sparse'}"})
    folder = lay(tmp_path / "job", recipe.model_copy(update={"model": source}))
    assert run_folder(folder)["outcome"] == "succeeded"
    assert json.loads((folder / "artifact" / "certificate.json").read_text())["ok"]
    after = load_tensors(folder / "artifact" / "merged" / "model.safetensors")
    weight = next(tensor for name, tensor in after.items() if name.endswith("layer.0.output.dense.weight"))
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()


def test_bf16_keeps_thin_matrices_in_fp32(pruned: Path) -> None:
    attached = attach(pruned)
    halve_frozen(attached.model)
    start = parameter_copy(attached.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = attached.train(random_batches(400), 3, learning_rate=1e-6)
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = [(p.detach() - start[n]).abs().max() for n, p in attached.trainables.items() if n.endswith("lora_B")]
    assert all(0 < float(m) < 1e-5 for m in moved)  # far below what bf16 resolves next to one
    layer = next(iter(masked_layers(attached.model).values()))
    assert layer.merged().dtype == torch.float32 and layer.mask is not None and not layer.merged()[~layer.mask].any()


# ── the output layer ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    from tests.engine.unit.tiny_models import tiny_llama

    return tiny_llama(tmp_path / "untied", tie_word_embeddings=False)


def test_the_output_layer_learns_as_ordinary_lora(untied: Path) -> None:
    facts = model_facts(f"folder:{untied}", task="causal_lm")
    assert output_layer(facts) == "lm_head"
    params = {"r": 4, "targets": "none", "head": True}
    attached = attach(untied, **params)
    assert set(dict(attached.trainables.items())) == {"lm_head.lora_A", "lm_head.lora_B"}
    parsed = MaskLoRA.Params(**params)
    assert MaskLoRA.claims(parsed, attached.facts) == {"lm_head.weight"}
    assert MaskLoRA.num_trainable(parsed, attached.facts) == attached.trainables.num_elements()
    attached.train(random_batches(facts.vocab_size), 3)
    batch = next(random_batches(facts.vocab_size, seed=5))
    measured = attached.logits(batch)
    attached.part.merge(attached.model)
    torch.testing.assert_close(attached.logits(batch), measured, rtol=0, atol=1e-4)


def test_a_tied_output_layer_is_refused(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    (fault,) = MaskLoRA.check(MaskLoRA.Params(r=4, head=True), facts)
    assert fault.where == "head" and "word table" in fault.why and fault.way_out
    faults = MaskLoRA.check(MaskLoRA.Params(r=4, targets="none"), facts)
    assert [fault.code for fault in faults] == ["nothing_learns"]


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_targets_and_families(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    (fault,) = MaskLoRA.check(MaskLoRA.Params(r=33), facts)
    assert fault.where == "r" and "32" in fault.way_out
    (fault,) = MaskLoRA.check(MaskLoRA.Params(r=4, targets="q_porj"), facts)
    assert "q_proj" in fault.way_out
    odd = facts_for(replace(facts.model, linears={}, family="gpt2"), "causal_lm")
    assert not MaskLoRA.supports(odd).ok


@pytest.mark.parametrize("rival", ["lora", "scalelora", "full-finetuning", "paca"])
def test_two_methods_on_one_layer_are_refused_by_the_rule(tiny: Tiny, rival: str) -> None:
    recipe = tiny.recipe([("masklora", {"r": 4})])
    both = recipe.model_copy(update={"methods": (*recipe.methods, MethodRef(slug=rival, params={}))})
    faults = check(both).faults
    assert any(fault.code == "claimed_twice" and fault.way_out for fault in faults)


def test_disjoint_layers_may_stand_together(tiny: Tiny) -> None:
    apart: list[tuple[str, dict[str, Any]]] = [
        ("masklora", {"r": 4, "targets": "attention"}), ("scalelora", {"r": 4, "targets": "feed-forward"}),
    ]  # fmt: skip
    assert check(tiny.recipe(apart)).faults == []


def test_the_start_draws_are_seeded_per_layer(pruned: Path) -> None:
    one, same = attach(pruned), attach(pruned)
    layers, again = masked_layers(one.model), masked_layers(same.model)
    assert all(torch.equal(layers[name].lora_A, again[name].lora_A) for name in layers)
    a, b = (layers[f"model.layers.{i}.mlp.up_proj"].lora_A for i in (0, 1))
    assert not torch.equal(a, b)


def test_start_factors_are_what_they_say() -> None:
    plain = nn.Linear(10, 6)

    def draw(kind: Any) -> tuple[Tensor, Tensor]:
        return start_factors(plain, 3, kind, torch.Generator().manual_seed(1))

    a, b = draw("add")
    assert not b.any() and 0 < float(a.abs().max()) <= 10**-0.5
    a, b = draw("scale")
    assert torch.equal(b @ a, torch.ones(6, 10)) and a[1:].any() and not b[:, 1:].any()
