"""SparseGPT against optimal-brain-surgeon updates with explicit inverses, and against magnitude pruning of the same layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.io.facts import model_facts
from engine.ops.folder import run_folder
from engine.parts.chain import BlockChain, Inputs, prune_blockwise, prune_sparsegpt, prune_wanda
from engine.parts.pruning import Pattern, load_masks, prunable
from engine.parts.sparsegpt import inverse_factor, output_error, sparsegpt
from tests.engine.tiny import Tiny, lay

OUT, IN, TOKENS = 6, 12, 40


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    mix = torch.randn(IN, IN, generator=g, dtype=torch.float64)  # inputs that go together
    x = mix @ torch.randn(IN, TOKENS, generator=g, dtype=torch.float64)
    return torch.randn(OUT, IN, generator=g, dtype=torch.float64), x @ x.T


def brute_force(weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float, block: int) -> tuple[Tensor, Tensor]:
    """Row by row and column by column; every inverse is made anew from the columns that are left."""
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    left = [torch.linalg.inv(h[j:, j:]) for j in range(IN)]  # H_F^-1 with F = the columns from j on
    w, mask, gone = weight.clone(), torch.ones(OUT, IN, dtype=torch.bool), 0
    for start in range(0, IN, block):
        stop = min(start + block, IN)
        if not pattern.structured:
            score = torch.stack([w[:, j] ** 2 / left[j][0, 0] for j in range(start, stop)], 1)
            goal = int(pattern.sparsity * OUT * stop + 0.5)
            for place in score.flatten().argsort()[: goal - gone].tolist():
                mask[place // (stop - start), start + place % (stop - start)] = False
            gone = goal
        for j in range(start, stop):
            if pattern.structured and j % pattern.m == 0:
                for row in range(OUT):
                    order = sorted(range(pattern.m), key=lambda k: float(w[row, j + k] ** 2 / left[j + k][0, 0]))
                    for k in order[: pattern.m - pattern.n]:
                        mask[row, j + k] = False
            for row in range(OUT):
                if not mask[row, j]:
                    w[row, j:] -= w[row, j] / left[j][0, 0] * left[j][0]
                    w[row, j] = 0.0
    return w, mask


@pytest.mark.parametrize("block", [12, 4, 5, 1])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_unstructured_equals_brute_force(layer: tuple[Tensor, Tensor], sparsity: float, block: int) -> None:
    weight, hessian = layer
    ours, mask = sparsegpt(weight, hessian, Pattern(sparsity), damping=0.01, block=block)
    theirs, expected = brute_force(weight, hessian, Pattern(sparsity), 0.01, block)
    assert torch.equal(mask, expected) and int((~mask).sum()) == int(sparsity * OUT * IN + 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert not ours[~mask].any()


@pytest.mark.parametrize(("name", "block"), [("2:4", 12), ("2:4", 4), ("1:4", 8), ("2:4", 6)])
def test_n_of_m_equals_brute_force(layer: tuple[Tensor, Tensor], name: str, block: int) -> None:
    weight, hessian = layer
    pattern = Pattern.of(name, 0.5)
    ours, mask = sparsegpt(weight, hessian, pattern, damping=0.01, block=block)
    theirs, expected = brute_force(weight, hessian, pattern, 0.01, 4)
    assert torch.equal(mask, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert (mask.view(OUT, -1, 4).sum(2) == pattern.n).all()


def test_one_weight_that_goes_last_is_the_best_answer_there_is() -> None:
    """With the only pruned column in front, all others may help: the result is the least-squares optimum for the mask."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(IN, TOKENS, generator=g, dtype=torch.float64)
    weight = torch.randn(1, IN, generator=g, dtype=torch.float64)
    weight[0, 0] = 1e-4  # surely the first to go
    pruned, mask = sparsegpt(weight, x @ x.T, Pattern(1 / IN), damping=1e-12, block=IN)
    assert not mask[0, 0] and int(mask.sum()) == IN - 1
    best = torch.linalg.lstsq(x[1:].T, (weight @ x).T).solution.T
    torch.testing.assert_close(pruned[:, 1:], best, rtol=1e-6, atol=1e-9)


def test_unrelated_inputs_of_one_size_make_it_magnitude_pruning(layer: tuple[Tensor, Tensor]) -> None:
    weight, _ = layer
    pruned, mask = sparsegpt(weight, 3.0 * torch.eye(IN, dtype=torch.float64), Pattern(0.5), block=IN)
    assert torch.equal(mask, Pattern(0.5).keep(weight.abs()))
    torch.testing.assert_close(pruned, torch.where(mask, weight, 0.0))


@pytest.mark.parametrize("name", ["unstructured", "2:4"])
def test_the_output_changes_less_than_with_magnitude_or_wanda(name: str) -> None:
    g, pattern = torch.Generator().manual_seed(5), Pattern.of(name, 0.5)
    x = torch.randn(64, 64, generator=g) @ torch.randn(64, 300, generator=g)  # inputs that go together
    weight, hessian = torch.randn(32, 64, generator=g), x @ x.T
    ours, _ = sparsegpt(weight, hessian, pattern)
    by_size = torch.where(pattern.keep(weight.abs()), weight, 0.0)
    by_flow = torch.where(pattern.keep(weight.abs() * hessian.diagonal().sqrt(), per_row=True), weight, 0.0)
    errors = [output_error(weight, other, hessian) for other in (ours, by_flow, by_size)]
    assert errors[0] < min(errors[1:]), errors


def test_the_error_is_that_of_the_outputs() -> None:
    g = torch.Generator().manual_seed(2)
    x, w, v = (torch.randn(*shape, generator=g) for shape in ((5, 30), (4, 5), (4, 5)))
    assert output_error(w, v, x @ x.T) == pytest.approx(float(((w - v) @ x).square().sum()), rel=1e-5)


def test_dead_inputs_and_the_factor() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(8, 50, generator=g, dtype=torch.float64)
    x[2] = 0.0
    h = x @ x.T
    u = inverse_factor(h, 0.01)
    full = h.double()
    full[2, 2] = 1.0
    full += 0.01 * full.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(full), rtol=1e-8, atol=1e-10)
    weight = torch.randn(5, 8, generator=g, dtype=torch.float64)
    pruned, mask = sparsegpt(weight, h, Pattern(0.5), block=8)
    assert not pruned[:, 2].any() and int((~mask).sum()) == 20


def test_singular_inputs_are_refused_in_a_sentence() -> None:
    layer, seen = nn.Linear(4, 3, bias=False), Inputs(4, torch.device("cpu"), full=True)
    seen.add(torch.ones(10, 4) * 1e20)
    with pytest.raises(EngineError, match="too much alike"):
        prune_sparsegpt("x", layer, seen, Pattern(0.5), damping=0.0, block=4)


def test_the_whole_job_prunes_block_by_block_and_keeps_the_mask(tiny: Tiny, tmp_path: Path) -> None:
    from engine.core.recipe import parse_recipe
    from engine.io.tensors import load_tensors
    from engine.ops.check import require

    body = {**tiny.inputs("causal_lm"), "operation": "transform", "settings": {"max_length": 48},
            "methods": [{"slug": "sparsegpt", "params": {"pattern": "2:4", "samples": 12}}]}  # fmt: skip
    folder = lay(tmp_path / "job", require(parse_recipe(body)).recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    merged = folder / "artifact" / "merged"
    after = load_tensors(merged / "model.safetensors")
    before = load_tensors(tiny.folder / "decoder" / "model.safetensors")
    layers = prunable(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"))
    masks = load_masks(merged, {f"{name}.weight": shape for name, shape in layers.items()})
    assert masks.keys() == {f"{name}.weight" for name in layers}
    for name, tensor in after.items():
        if name not in masks:
            assert torch.equal(tensor, before[name])
            continue
        assert not tensor[~masks[name]].any() and ((tensor.view(-1, 4) != 0).sum(1) == 2).all()
        assert not torch.equal(tensor[masks[name]], before[name][masks[name]])  # the kept ones were corrected


def test_less_harm_than_wanda_in_every_layer_of_a_real_model(shared_data: Path) -> None:
    import copy

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.starters.corpus import stories

    folder = shared_data / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(" ".join(stories(1, 16)), return_tensors="pt").input_ids[0]
    batches = [{"input_ids": part} for part in ids[: len(ids) // 512 * 512].view(-1, 128).split(8)]
    layers = prunable(model_facts(f"folder:{folder}", task="causal_lm"))
    found = []
    for prune in (
        lambda name, module, seen: prune_sparsegpt(name, module, seen, Pattern(0.6), damping=0.01, block=128),
        lambda name, module, seen: prune_wanda(module, seen, Pattern(0.6)),
    ):
        chain = BlockChain(copy.deepcopy(model), batches)
        found.append(prune_blockwise(chain, layers, prune, full=True)[1])
    ours, theirs = found
    assert ours.keys() == theirs.keys() == layers.keys()
    assert sum(ours[name] < theirs[name] for name in layers) >= 0.95 * len(layers)
    assert sum(ours.values()) < 0.8 * sum(theirs.values())
