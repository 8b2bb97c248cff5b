"""Magnitude pruning: exact counts, n:m groups and the stored mask, against plain Python."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.core.errors import EngineError
from engine.core.facts import ModelFacts
from engine.io.facts import model_facts
from engine.io.models import load_config, load_model
from engine.io.tensors import load_tensors
from engine.methods.magnitude_pruning import MagnitudePruning
from engine.ops.transform import transform
from engine.parts.pruning import (
    MASK_FILE,
    Pattern,
    keep_n_of_m,
    keep_per_row,
    keep_per_tensor,
    load_masks,
    mask_of,
    pack_bits,
    prunable,
    save_masks,
    unpack_bits,
)
from tests.engine.attached import facts_for, logits_of, random_batches
from tests.engine.tiny import Tiny


def described(tiny: Tiny, name: str = "decoder", task: str = "causal_lm") -> ModelFacts:
    return model_facts(f"folder:{tiny.folder / name}", task=task)


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    transform("magnitude-pruning", {"sparsity": 0.6}, [tiny.folder / "decoder"], out)
    return out


# ── masks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.6, 0.77, 0.99])
def test_the_count_is_exact_even_when_all_scores_are_equal(sparsity: float) -> None:
    score = torch.ones(7, 13)
    gone = ~keep_per_tensor(score, sparsity)
    assert int(gone.sum()) == int(sparsity * 91 + 0.5)
    rows = ~keep_per_row(score, sparsity)
    assert rows.sum(1).tolist() == [int(sparsity * 13 + 0.5)] * 7


def test_the_smallest_go_and_of_equal_ones_the_first() -> None:
    rng = random.Random(1)
    values = [rng.randint(0, 5) for _ in range(60)]  # many ties
    order = sorted(range(60), key=lambda i: (values[i], i))
    mask = keep_per_tensor(torch.tensor(values, dtype=torch.float32).view(6, 10), 0.4).flatten().tolist()
    assert [i for i in range(60) if not mask[i]] == sorted(order[:24])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_n_of_m_keeps_exactly_the_n_largest_of_every_group(n: int, m: int) -> None:
    score = torch.rand(9, 3 * m, generator=torch.Generator().manual_seed(0))
    mask = keep_n_of_m(score, n, m)
    for row in range(9):
        for start in range(0, 3 * m, m):
            group = score[row, start : start + m].tolist()
            kept = {i for i in range(m) if mask[row, start + i]}
            assert kept == set(sorted(range(m), key=lambda i: -group[i])[:n])
    assert keep_n_of_m(torch.ones(2, m), n, m).sum(1).tolist() == [n, n]


def test_a_pattern_says_what_is_kept() -> None:
    assert Pattern.of("1:4", 0.5).sparsity == 0.75  # 1 of 4 kept: not the share 1/4 that a "drop n" reading would give
    assert Pattern.of("unstructured", 0.3).sparsity == 0.3
    for wrong in ("4:2", "0:4", "2-4", ""):
        with pytest.raises(ValueError, match="no pattern"):
            Pattern.of(wrong, 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (5, 7, 3)])
def test_bits_and_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.5
    packed = pack_bits(mask)
    assert packed.numel() == (mask.numel() + 7) // 8 and torch.equal(unpack_bits(packed, shape), mask)
    assert int(packed[0]) >> 7 == int(mask.flatten()[0])
    save_masks(tmp_path, {"body.a.weight": mask})
    assert torch.equal(load_masks(tmp_path, {"a.weight": shape})["a.weight"], mask)
    assert torch.equal(load_masks(tmp_path, {"body.a.weight": shape})["body.a.weight"], mask)
    with pytest.raises(EngineError, match="does not belong"):
        load_masks(tmp_path, {"a.weight": (100, 100)})


# ── the transformation ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_layer_inside_the_blocks_and_nothing_else(tiny: Tiny, pruned: Path) -> None:
    before, after = (load_tensors(folder / "model.safetensors") for folder in (tiny.folder / "decoder", pruned))
    layers = {f"{name}.weight" for name in prunable(described(tiny))}
    assert len(layers) == 14 and not any("embed" in name or "lm_head" in name for name in layers)
    for name, tensor in before.items():
        if name not in layers:
            assert torch.equal(after[name], tensor), name
            continue
        size = tensor.numel()
        assert int((after[name] == 0).sum()) == int(0.6 * size + 0.5), name
        kept = after[name] != 0
        assert torch.equal(after[name][kept], tensor[kept])
        assert tensor[~kept].abs().max() <= tensor[kept].abs().min()
    report = json.loads((pruned / "transform.json").read_text())["report"]["mask"]
    assert (
        report["kept"] == sum(int((after[name] != 0).sum()) for name in layers) and report["tensors"].keys() == layers
    )


def test_poolers_and_classifiers_stay(tiny: Tiny, tmp_path: Path) -> None:
    transform("magnitude-pruning", {"pattern": "2:4"}, [tiny.folder / "encoder"], tmp_path / "out")
    before, after = (
        load_tensors(folder / "model.safetensors") for folder in (tiny.folder / "encoder", tmp_path / "out")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("encoder.layer." in name and name.endswith("weight") for name in changed)
    for name in changed:
        assert ((after[name].view(-1, 4) != 0).sum(1) == 2).all(), name


@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_patterns_hold_in_every_group(tiny: Tiny, tmp_path: Path, pattern: str, kept: int, group: int) -> None:
    transform("magnitude-pruning", {"pattern": pattern}, [tiny.folder / "decoder"], tmp_path / "out")
    after = load_tensors(tmp_path / "out" / "model.safetensors")
    for name in prunable(described(tiny)):
        assert ((after[f"{name}.weight"].view(-1, group) != 0).sum(1) == kept).all(), name


def test_random_is_a_baseline_with_a_seed_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for place, params in enumerate(({"mask_seed": 1}, {"mask_seed": 1}, {"mask_seed": 2})):
        transform("magnitude-pruning", {"score": "random", **params}, [tiny.folder / "decoder"], tmp_path / str(place))
        found.append(load_tensors(tmp_path / str(place) / MASK_FILE))
    name = next(iter(found[0]))
    assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])


def test_the_number_format_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "half"
    shutil.copytree(tiny.folder / "decoder", folder)
    tensors = load_tensors(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    transform("magnitude-pruning", {"sparsity": 0.6}, [folder], tmp_path / "out")
    after = load_tensors(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    masks = load_masks(tmp_path / "out", {name: tuple(tensor.shape) for name, tensor in after.items()})
    for name, mask in masks.items():  # bf16 has many ties, and the count is still exact
        assert int((~mask).sum()) == int(0.6 * mask.numel() + 0.5) and not after[name][~mask].any()


# ── the mask beside the weights ───────────────────────────────────────────────────────────────────────────────────────


def test_the_stored_mask_knows_a_kept_weight_that_is_zero(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "with_zero"
    shutil.copytree(tiny.folder / "decoder", folder)
    tensors = load_tensors(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][:, :20] = 0.0  # 20 of 32 columns: more zeros than half, so that some of them are kept
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    transform("magnitude-pruning", {"sparsity": 0.5}, [folder], tmp_path / "out")
    after = load_tensors(tmp_path / "out" / "model.safetensors")[name]
    mask = load_masks(tmp_path / "out", {name: tuple(after.shape)})[name]
    assert int(mask.sum()) == after.numel() // 2 > int((after != 0).sum())
    model, _ = load_model(
        tmp_path / "out", "AutoModelForCausalLM", dtype=torch.float32, config=load_config(tmp_path / "out"), seed=1
    )
    layer = name.removesuffix(".weight")
    assert torch.equal(mask_of(model, str(tmp_path / "out"), [layer])[layer], mask)
    (tmp_path / "out" / MASK_FILE).unlink()
    assert torch.equal(mask_of(model, str(tmp_path / "out"), [layer])[layer], after != 0)


def test_a_mask_of_other_weights_is_refused(tiny: Tiny, pruned: Path) -> None:
    model, _ = load_model(
        tiny.folder / "decoder", "AutoModelForCausalLM", dtype=torch.float32, config=load_config(pruned), seed=1
    )
    with pytest.raises(EngineError, match="says that they were removed"):
        mask_of(model, str(pruned), ["model.layers.0.mlp.up_proj"])


def test_the_result_is_an_ordinary_model(tiny: Tiny, pruned: Path) -> None:
    from transformers import AutoModelForCausalLM

    batch = next(random_batches(400))
    dense, sparse = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny.folder / "decoder", pruned)
    )
    assert not torch.allclose(logits_of(dense, batch), logits_of(sparse, batch), atol=1e-3)
    assert model_facts(f"folder:{pruned}", task="causal_lm").linears == described(tiny).linears


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_widths_that_do_not_divide_are_refused_with_what_fits(tiny: Tiny) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    assert MagnitudePruning.check(MagnitudePruning.Params(pattern="4:8"), facts) == []
    odd = replace(facts.model, linears={**facts.model.linears, "model.layers.0.mlp.down_proj": (32, 172)})
    (fault,) = MagnitudePruning.check(MagnitudePruning.Params(pattern="4:8"), facts_for(odd, "causal_lm"))
    assert "172" in fault.why and "2:4" in fault.way_out and "4:8" not in fault.way_out
    assert MagnitudePruning.check(MagnitudePruning.Params(pattern="2:4"), facts_for(odd, "causal_lm")) == []


def test_gpt2_is_refused_before_anything_is_read(tmp_path: Path, tiny: Tiny) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400, n_positions=32)).save_pretrained(
        tmp_path / "gpt2"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.folder / "decoder" / name, tmp_path / "gpt2" / name)
    verdict = MagnitudePruning.supports(
        facts_for(model_facts(f"folder:{tmp_path / 'gpt2'}", task="causal_lm"), "causal_lm")
    )
    assert not verdict.ok and "gpt2" in verdict.why and verdict.way_out
    with pytest.raises(EngineError, match="gpt2"):
        transform("magnitude-pruning", {}, [tmp_path / "gpt2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
