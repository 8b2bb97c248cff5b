"""Wanda against a few lines of plain loops, and the block-by-block order that it depends on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.core.recipe import parse_recipe
from engine.io.facts import model_facts
from engine.io.tensors import load_tensors
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.parts.chain import BlockChain, Inputs, block_names, prune_blockwise, prune_wanda
from engine.parts.pruning import Pattern, prunable
from tests.engine.attached import random_batches
from tests.engine.tiny import Tiny, lay


@pytest.fixture
def model(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32).eval()


def layers_of(tiny: Tiny) -> dict[str, tuple[int, int]]:
    return prunable(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"))


def texts(count: int = 2) -> list[dict[str, Tensor]]:
    stream = random_batches(400)
    return [{"input_ids": next(stream)["input_ids"]} for _ in range(count)]


def by_hand(weight: Tensor, norms: list[float], sparsity: float) -> Tensor:
    """The published rule with sorted lists."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    for i, row in enumerate(weight.tolist()):
        order = sorted(range(len(row)), key=lambda j: abs(row[j]) * norms[j])
        for j in order[: round(sparsity * len(row))]:
            kept[i, j] = False
    return kept


def test_one_layer_equals_the_rule_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 7)
    before = layer.weight.detach().clone()
    parts = [torch.randn(5, 10) * torch.arange(1, 11), torch.randn(9, 10)]
    seen = Inputs(10, torch.device("cpu"), full=False)
    for part in parts:
        seen.add(part)
    mask = prune_wanda(layer, seen, Pattern(0.5))
    norms = torch.cat(parts).norm(dim=0).tolist()
    assert torch.equal(mask, by_hand(before, norms, 0.5)) and seen.num_tokens == 14
    assert torch.equal(layer.weight, torch.where(mask, before, 0.0))
    assert not torch.equal(mask, Pattern(0.5).keep(before.abs(), per_row=True))  # the inputs matter


def test_every_row_loses_the_same_number_and_groups_are_kept() -> None:
    torch.manual_seed(0)
    layer, seen = nn.Linear(16, 9), Inputs(16, torch.device("cpu"), full=False)
    seen.add(torch.randn(20, 16))
    other = copy.deepcopy(layer)
    assert (prune_wanda(layer, seen, Pattern(0.6)).sum(1) == 16 - 10).all()
    assert (prune_wanda(other, seen, Pattern.of("2:4", 0.5)).view(9, 4, 4).sum(2) == 2).all()


def test_later_blocks_see_what_pruned_blocks_make(model: Any, tiny: Tiny) -> None:
    """The whole chain against hooks on whole-model passes: prune a block, run everything again, look at the next one."""
    batches, layers, dense = texts(), layers_of(tiny), copy.deepcopy(model)
    chain = BlockChain(model, batches)
    masks, _ = prune_blockwise(
        chain, layers, lambda name, module, seen: prune_wanda(module, seen, Pattern(0.5)), full=False
    )
    reference = copy.deepcopy(dense)
    untouched: dict[str, Tensor] = {}
    for block in range(2):
        inside = [name for name in layers if f"layers.{block}." in name]
        sums = {name: torch.zeros(layers[name][1]) for name in inside}

        for source in (reference, dense):
            for tensor in sums.values():
                tensor.zero_()
            hooks = [source.get_submodule(name).register_forward_pre_hook(adding(sums[name])) for name in inside]
            with torch.no_grad():
                for batch in batches:
                    source(**batch)
            for hook in hooks:
                hook.remove()
            if source is reference:
                expected = {
                    name: by_hand(reference.get_submodule(name).weight.detach(), sums[name].sqrt().tolist(), 0.5)
                    for name in inside
                }
            else:
                untouched |= {name: tensor.clone() for name, tensor in sums.items()}
        for name in inside:
            assert torch.equal(masks[f"{name}.weight"], expected[name]), name
            weight = reference.get_submodule(name).weight
            weight.data = torch.where(expected[name], weight, 0.0)
    last = "model.layers.1.mlp.down_proj"
    assert not torch.allclose(
        untouched[last], sums_of(reference, last, batches), rtol=1e-2
    )  # the dense model shows other inputs


def adding(total: Tensor) -> Any:
    def hook(module: Any, args: Any) -> None:
        total.add_(args[0].detach().flatten(0, 1).square().sum(0))

    return hook


def sums_of(model: Any, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: found.append(a[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(found).square().sum(0)


def test_padding_counts_for_nothing(model: Any, tiny: Tiny) -> None:
    ids = texts(1)[0]["input_ids"]
    padded = torch.cat([ids, torch.full((4, 6), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 6, dtype=ids.dtype)], 1)
    found = []
    for batch in (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": padded, "attention_mask": mask},
    ):
        chain = BlockChain(copy.deepcopy(model), [batch])
        seen = Inputs(32, torch.device("cpu"), full=True)
        chain.measure(chain.linears(0, {"model.layers.0.self_attn.o_proj": 1}), lambda name, x, seen=seen: seen.add(x))
        assert seen.num_tokens == ids.numel()
        found.append(seen.hessian)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_the_chain_is_the_model(model: Any) -> None:
    batches = texts()
    assert block_names(model) == ["model.layers.0", "model.layers.1"]
    chain = BlockChain(model, batches)
    chain.advance()
    chain.advance()
    with torch.no_grad():
        for batch, hidden in zip(batches, chain.hidden, strict=True):
            torch.testing.assert_close(model.lm_head(model.model.norm(hidden)), model(**batch).logits)


def test_encoders_can_be_pruned_too(tiny: Tiny, tmp_path: Path) -> None:
    body = {**tiny.inputs("classify"), "operation": "transform", "settings": {"max_length": 48},
            "methods": [{"slug": "wanda", "params": {"sparsity": 0.5, "samples": 12}}]}  # fmt: skip
    folder = lay(tmp_path / "job", require(parse_recipe(body)).recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    after = load_tensors(folder / "artifact" / "merged" / "model.safetensors")
    assert ((after["encoder.layer.1.output.dense.weight"] != 0).sum(1) == 32).all()


def test_models_without_one_chain_of_blocks_are_refused() -> None:
    with pytest.raises(EngineError, match="no repeated blocks"):
        block_names(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(EngineError, match="no text"):
        BlockChain(_Chain(), [])


def test_a_model_that_does_more_between_its_blocks_is_refused() -> None:
    batch = [{"input_ids": torch.randint(0, 9, (2, 5))}]
    assert len(BlockChain(_Chain(), batch).blocks) == 3
    with pytest.raises(EngineError, match="not what enters the next"):
        BlockChain(_Chain(between=1.0), batch)


class _Chain(nn.Module):
    def __init__(self, between: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})}) for _ in range(3)
        )
        for layer in self.layers:
            layer.forward = lambda x, layer=layer: x + layer["attn"]["q_proj"](x)
        self.between = between

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x) + self.between
        return x


def test_data_are_needed(tiny: Tiny) -> None:
    body = {**tiny.inputs("causal_lm"), "operation": "transform", "methods": [{"slug": "wanda"}]}
    body["data"] = None
    faults = check(parse_recipe(body)).faults
    assert any(fault.where == "data" and fault.way_out for fault in faults)
