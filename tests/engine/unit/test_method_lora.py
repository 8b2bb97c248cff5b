"""LoRA and its variants: files that the real peft reads, exact merges, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.io.facts import model_facts
from engine.methods.lora import LoRA
from engine.train.parts import PartContext
from engine.train.trainables import collect
from tests.engine.attached import Attached, Topics, facts_for, logits_of, parameter_copy, random_batches, write_peft
from tests.engine.tiny import Tiny

VARIANTS: list[dict[str, Any]] = [
    {}, {"init": "gaussian"}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}, {"init": "pissa"},
    {"init": "olora"}, {"init": "pissa", "use_rslora": True}, {"targets": "attention"}, {"targets": "q_proj,down_proj"},
]  # fmt: skip
NAMES = ["-".join(f"{key}={value}" for key, value in variant.items()) or "plain" for variant in VARIANTS]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)


def lora(**params: Any) -> LoRA:
    return LoRA(LoRA.Params(**{"r": 4, "alpha": 8, **params}))


def decoder(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32).eval()


def encoder(tiny: Tiny) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(
        tiny.folder / "encoder", num_labels=3, dtype=torch.float32
    ).eval()


def on_decoder(tiny: Tiny, *, seed: int = 3, **params: Any) -> Attached:
    facts = model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")
    return Attached(decoder(tiny), lora(**params), facts_for(facts, "causal_lm"), seed=seed)


@every_variant
def test_start_learning_file_and_merge(tiny: Tiny, tmp_path: Path, variant: dict[str, Any]) -> None:
    from peft import PeftModel

    attached = on_decoder(tiny, **variant)
    batches = random_batches(400)
    batch = next(batches)
    base = logits_of(decoder(tiny), batch)
    torch.testing.assert_close(attached.logits(batch), base, rtol=0, atol=1e-5)  # the start is the base model
    assert type(attached.model).__name__ == "LlamaForCausalLM" and not hasattr(attached.model, "peft_config")

    attached.train(batches, 5)
    learned = attached.logits(batch)
    assert (learned - base).abs().max() > 1e-2
    folder = write_peft(attached.part.export(attached.model), tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(decoder(tiny), folder), batch), learned, rtol=0, atol=1e-5
    )

    assert attached.part.merge(attached.model)
    assert {type(attached.model.get_submodule(name)) for name in attached.facts.model.linears} == {nn.Linear}
    torch.testing.assert_close(attached.logits(batch), learned, rtol=0, atol=1e-5)
    assert attached.model.state_dict().keys() == decoder(tiny).state_dict().keys()


@every_variant
def test_restore_on_a_fresh_model(tiny: Tiny, variant: dict[str, Any]) -> None:
    attached = on_decoder(tiny, **variant)
    batches = random_batches(400)
    attached.train(batches, 3)
    batch = next(batches)
    other = on_decoder(tiny, seed=8, **variant)
    other.part.restore(other.model, attached.part.export(attached.model))
    torch.testing.assert_close(other.logits(batch), attached.logits(batch), rtol=0, atol=1e-5)
    again = other.part.export(other.model)  # what was restored can leave again
    for name, tensor in attached.part.export(attached.model).tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor)


@pytest.mark.parametrize("task", ["causal_lm", "classify"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_files_equal_those_that_peft_writes(tiny: Tiny, tmp_path: Path, task: str, use_dora: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    folder = tiny.folder / ("encoder" if task == "classify" else "decoder")
    model = encoder(tiny) if task == "classify" else decoder(tiny)
    attached = Attached(
        model, lora(use_dora=use_dora, targets="attention"), facts_for(model_facts(f"folder:{folder}", task=task), task)
    )
    payload = attached.part.export(attached.model)
    kind = {"classify": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}[task]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=payload.config["target_modules"], task_type=kind, use_dora=use_dora,
                        modules_to_save=["classifier"] if task == "classify" else None)  # fmt: skip
    theirs = get_peft_model(encoder(tiny) if task == "classify" else decoder(tiny), config)
    theirs.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in payload.tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    free = {"base_model_name_or_path", "target_modules", "modules_to_save"}
    assert {k: v for k, v in payload.config.items() if k not in free} == {
        k: v for k, v in written.items() if k not in free
    }
    assert sorted(payload.config["target_modules"]) == sorted(written["target_modules"])
    assert set(payload.config["modules_to_save"] or ()) <= set(written["modules_to_save"] or ())


def test_a_new_classifier_travels_with_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    facts = facts_for(model_facts(f"folder:{tiny.folder / 'encoder'}", task="classify"), "classify")
    attached = Attached(encoder(tiny), lora(), facts)
    assert "fresh.classifier.weight" in dict(attached.trainables.items())
    batches = random_batches(400, classes=3)
    attached.train(batches, 5)
    batch = next(batches)
    folder = write_peft(attached.part.export(attached.model), tmp_path / "adapter")
    base = encoder(tiny)
    nn.init.normal_(base.classifier.weight)  # the loader must not be lucky
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(base, folder), batch), attached.logits(batch), rtol=0, atol=1e-5
    )


def test_only_the_claimed_layers_change_and_nothing_else_learns(tiny: Tiny) -> None:
    before = parameter_copy(decoder(tiny))
    attached = on_decoder(tiny, targets="v_proj", use_dora=True)
    assert sum(p.requires_grad for p in attached.model.parameters()) == len(attached.trainables) == 6
    assert attached.trainables.num_elements() == LoRA.num_trainable(
        LoRA.Params(r=4, targets="v_proj", use_dora=True), attached.facts
    )
    attached.train(random_batches(400), 3)
    attached.part.merge(attached.model)
    claimed = LoRA.claims(LoRA.Params(targets="v_proj"), attached.facts)
    changed = {name for name, tensor in attached.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == claimed


def test_two_adapters_stand_side_by_side(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    attached = on_decoder(tiny, targets="attention")
    ctx = PartContext(recipe=attached.ctx.recipe, facts=facts, task=Topics(), slug="lora", index=1)
    second = lora(targets="feed-forward").parts(ctx)[0]
    second.attach(attached.model)
    attached.trainables = collect(attached.model, [attached.part, second], ())
    batches = random_batches(400)
    start = {name: tensor.clone() for name, tensor in attached.trainables.tensors().items()}
    attached.train(batches, 3)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in attached.trainables.tensors().items())
    batch = next(batches)
    learned = attached.logits(batch)
    attached.part.merge(attached.model)
    second.merge(attached.model)
    torch.testing.assert_close(attached.logits(batch), learned, rtol=0, atol=1e-5)


def test_the_seed_decides_the_start_whatever_was_drawn_before(tiny: Tiny) -> None:
    one = on_decoder(tiny).trainables.tensors()
    torch.rand(7)
    drawn = torch.get_rng_state()
    two, three = on_decoder(tiny).trainables.tensors(), on_decoder(tiny, seed=4).trainables.tensors()
    assert torch.equal(torch.get_rng_state(), drawn)  # and the run's own generator is left alone
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_dropout_acts_in_training_only(tiny: Tiny) -> None:
    attached = on_decoder(tiny, dropout=0.5)
    batches = random_batches(400)
    attached.train(batches, 2)
    batch = next(batches)
    attached.model.train()
    assert attached.loss(batch).item() != attached.loss(batch).item()
    assert torch.equal(attached.logits(batch), attached.logits(batch))


def test_refusals(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    (fault,) = LoRA.check(LoRA.Params(r=33), facts)
    assert fault.where == "r" and "32 or less" in fault.way_out
    (fault,) = LoRA.check(LoRA.Params(r=4, targets="query"), facts)
    assert fault.where == "targets" and "q_proj" in fault.way_out
    (fault,) = LoRA.check(LoRA.Params(r=4, use_dora=True, init="pissa"), facts)
    assert fault.where == "init"
    assert LoRA.check(LoRA.Params(r=32, targets="k_proj"), facts) == []
