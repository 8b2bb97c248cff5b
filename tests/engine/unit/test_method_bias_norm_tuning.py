"""Bias and norm tuning: exactly the small vectors learn, on Llama, BERT and OPT, and models without them are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.facts import ModelFacts
from engine.io.facts import model_facts
from engine.methods.bias_norm_tuning import BiasNormTuning
from engine.ops.folder import run_folder
from engine.parts.vectors import vectors
from engine.train.trainables import optimizer_bytes
from tests.engine.attached import Attached, facts_for, logits_of, parameter_copy, random_batches
from tests.engine.tiny import Tiny, lay


def facts_of(tiny: Tiny, name: str, task: str) -> ModelFacts:
    return model_facts(f"folder:{tiny.folder / name}", task=task)


def attach(tiny: Tiny, **params: Any) -> Attached:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32)
    facts = facts_for(facts_of(tiny, "decoder", "causal_lm"), "causal_lm")
    return Attached(model, BiasNormTuning(BiasNormTuning.Params(**params)), facts)


def test_a_llama_has_norms_and_no_offsets(tiny: Tiny) -> None:
    shapes = facts_of(tiny, "decoder", "causal_lm").tensors
    expected = {
        f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")
    }
    assert set(vectors(shapes, "both")) == set(vectors(shapes, "norms")) == expected | {"model.norm.weight"}
    assert vectors(shapes, "biases") == []


def test_a_bert_has_both(tiny: Tiny) -> None:
    shapes = facts_of(tiny, "encoder", "classify").tensors
    norms, biases = vectors(shapes, "norms"), vectors(shapes, "biases")
    assert {name.rpartition(".")[2] for name in norms} == {"weight", "bias"} and all("LayerNorm" in n for n in norms)
    assert all(name.endswith(".bias") and "LayerNorm" not in name for name in biases) and len(biases) >= 12
    assert set(vectors(shapes, "both")) == {name for name, shape in shapes.items() if len(shape) == 1}


def test_names_of_other_families() -> None:
    shapes = {
        "model.decoder.layers.0.self_attn_layer_norm.weight": (8,), "model.decoder.layers.0.fc1.bias": (8,),
        "transformer.h.0.ln_1.weight": (8,), "transformer.h.0.ln_1.bias": (8,), "transformer.ln_f.weight": (8,),
        "model.layers.0.self_attn.q_norm.weight": (4,), "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.mixer.dt": (8,),
    }  # fmt: skip
    assert vectors(shapes, "biases") == ["model.decoder.layers.0.fc1.bias"]
    assert len(vectors(shapes, "norms")) == 5


def test_only_vectors_move_and_the_start_is_the_base(tiny: Tiny) -> None:
    attached, batch = attach(tiny), next(random_batches(400))
    before = parameter_copy(attached.model)
    assert torch.equal(attached.logits(batch), logits_of(attached.model, batch))
    attached.train(random_batches(400), 3)
    moved = {name for name, tensor in attached.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert (
        moved
        == set(dict(attached.trainables.items()))
        == BiasNormTuning.claims(BiasNormTuning.Params(), attached.facts)
    )
    assert attached.trainables.num_elements() == 5 * 32


def test_the_trained_share_and_the_optimizer_are_tiny(tiny: Tiny) -> None:
    attached = attach(tiny)
    optimizer = torch.optim.AdamW(list(attached.trainables), lr=1e-3)
    attached.loss(next(random_batches(400))).backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == 5 * 32 * 8 + 5 * 4
    assert attached.trainables.num_elements() < 0.01 * attached.facts.model.num_parameters


def test_export_and_restore(tiny: Tiny) -> None:
    attached = attach(tiny)
    attached.train(random_batches(400), 3)
    payload = attached.part.export(attached.model)
    assert payload is not None and set(payload.tensors) == set(payload.config["vectors"])
    other, batch = attach(tiny), next(random_batches(400, seed=5))
    assert not torch.allclose(other.logits(batch), attached.logits(batch), atol=1e-4)
    other.part.restore(other.model, payload)
    assert torch.equal(other.logits(batch), attached.logits(batch))


@pytest.mark.parametrize("task", ["classify", "causal_lm"])
def test_beside_other_slots(tiny: Tiny, tmp_path: Path, task: str) -> None:
    recipe = tiny.recipe([("bias-norm-tuning", {}), ("clip", {}), ("cosine", {}), ("patience", {})], task=task)
    result = run_folder(lay(tmp_path / "job", recipe))
    assert result["outcome"] == "succeeded", result["message"]


def test_biases_alone_are_refused_where_there_are_none(tiny: Tiny) -> None:
    facts = facts_for(facts_of(tiny, "decoder", "causal_lm"), "causal_lm")
    (fault,) = BiasNormTuning.check(BiasNormTuning.Params(parts="biases"), facts)
    assert fault.where == "parts" and "llama" in fault.why and "'norms'" in fault.way_out
    assert BiasNormTuning.check(BiasNormTuning.Params(parts="norms"), facts) == []
    bare = facts_for(replace(facts.model, tensors={"a.weight": (3, 3)}), "causal_lm")
    verdict = BiasNormTuning.supports(bare)
    assert not verdict.ok and verdict.way_out
