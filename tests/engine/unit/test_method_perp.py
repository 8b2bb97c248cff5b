"""The PERP flow on a tiny model: every criterion and every repair ends in a plain model with the same zeros and honest losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.core.recipe import parse_recipe
from engine.io.facts import model_facts
from engine.io.tensors import load_tensors
from engine.methods.perp import PERP, returned_weights
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.parts.pruning import MASK_FILE, pack_bits, prunable
from tests.engine.attached import facts_for
from tests.engine.tiny import Tiny, lay

SETTINGS = {"batch_size": 4, "max_length": 48, "evaluations": 1, "learning_rate": 1e-2, "precision": "fp32"}


def body(tiny: Tiny, **params: Any) -> dict[str, Any]:
    given = {"steps": 6, "samples": 8, "r": 4, "alpha": 8, **params}
    return {
        **tiny.inputs("causal_lm"),
        "operation": "flow",
        "settings": SETTINGS,
        "methods": [{"slug": "perp", "params": given}],
    }


@pytest.mark.parametrize(
    "params",
    [
        {"criterion": "magnitude", "sparsity": 0.6},
        {"criterion": "sparsegpt", "pattern": "2:4", "small_set": "scalelora", "with_vectors": False},
        {"criterion": "wanda", "how": "reconstruct"},
        {"criterion": "random", "small_set": "lora-prune"},
    ],
    ids=lambda params: "-".join(str(value) for value in params.values()),
)
def test_every_way_ends_with_the_same_zeros(tiny: Tiny, tmp_path: Path, params: dict[str, Any]) -> None:
    folder = lay(tmp_path / "job", require(parse_recipe(body(tiny, **params))).recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    artifact = folder / "artifact"
    about = json.loads((artifact / "artifact.json").read_text())
    assert json.loads((artifact / "certificate.json").read_text())["ok"]
    pruned = load_tensors(folder / "steps" / "01-prune" / "artifact" / "merged" / "model.safetensors")
    after = load_tensors(artifact / "merged" / "model.safetensors")
    for name in prunable(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")):
        zeros = after[f"{name}.weight"] == 0
        assert torch.equal(zeros, pruned[f"{name}.weight"] == 0), name
        if params.get("pattern") == "2:4":
            assert (zeros.view(-1, 4).sum(1) == 2).all()
    numbers = about["report"]["numbers"]
    wanted = (numbers["pruned_loss"] - numbers["repaired_loss"]) / (numbers["pruned_loss"] - numbers["dense_loss"])
    assert numbers["recovered"] is None or numbers["recovered"] == pytest.approx(wanted)
    assert about["metrics"]["eval_loss"] == numbers["repaired_loss"]
    assert about["ending"]["message"].endswith(".") and f"{numbers['repaired_loss']:.3f}" in about["ending"]["message"]
    assert about["methods"][0]["slug"] == "perp"


def test_the_output_layer_learns_beside_norms(tiny: Tiny, tmp_path: Path) -> None:
    from tests.engine.unit.tiny_models import tiny_llama

    recipe = body(tiny, small_set="vectors", head=True)
    recipe["model"] = {"source": f"folder:{tiny_llama(tmp_path / 'untied', tie_word_embeddings=False)}"}
    folder = lay(tmp_path / "job", require(parse_recipe(recipe)).recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    before = load_tensors(folder / "steps" / "01-prune" / "artifact" / "merged" / "model.safetensors")
    after = load_tensors(folder / "artifact" / "merged" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "lm_head.weight" in moved and all("norm" in name for name in moved - {"lm_head.weight"})


def test_weights_that_came_back_are_found(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False, True, True]])
    save_file({"a.weight": pack_bits(mask)}, tmp_path / MASK_FILE)
    for value, expected in ((0.0, []), (1e-30, ["body.a.weight"])):
        weight = torch.tensor([[1.0, value, 0.0, 2.0]])
        save_file({"body.a.weight": weight, "b.weight": weight.clone()}, tmp_path / "model.safetensors")
        assert returned_weights(tmp_path, tmp_path) == expected


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ({"how": "reconstruct", "small_set": "lora-prune"}, "small_set"),
        ({"how": "reconstruct", "head": True}, "head"),
        ({"head": True}, "head"),
        ({"r": 33}, "r"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(tiny: Tiny, params: dict[str, Any], where: str) -> None:
    faults = check(parse_recipe(body(tiny, **params))).faults
    assert [fault.where for fault in faults] == [f"methods[0].params.{where}"]
    assert all(fault.what and fault.why and fault.way_out for fault in faults)


def test_encoders_and_inner_methods_are_refused(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'encoder'}", task="classify"), "classify")
    assert not PERP.supports(facts).ok
    recipe = body(tiny)
    recipe["methods"].append({"slug": "lora"})
    faults = check(parse_recipe(recipe)).faults
    assert any(fault.code == "not_here" for fault in faults)
