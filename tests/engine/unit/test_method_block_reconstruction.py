"""Block-wise reconstruction: one block at a time, targets from the dense block, zeros kept, no block made worse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.bench.backward import saved_bytes
from engine.core.recipe import parse_recipe
from engine.io.facts import model_facts
from engine.io.tensors import load_tensors
from engine.methods.block_reconstruction import BlockReconstruction
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.ops.transform import transform
from engine.parts.chain import BlockChain
from engine.parts.pruning import MASK_FILE, mask_of, prunable
from engine.parts.reconstruct import Repair, reconstruct
from tests.engine.attached import random_batches
from tests.engine.tiny import Tiny, lay


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    transform("magnitude-pruning", {"sparsity": 0.6}, [tiny.folder / "decoder"], out)
    return out


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def texts(count: int = 3) -> list[dict[str, Tensor]]:
    stream = random_batches(400)
    return [{"input_ids": next(stream)["input_ids"]} for _ in range(count)]


def run(tiny: Tiny, pruned: Path, **changes: Any) -> tuple[Any, list[Any], dict[str, Tensor]]:
    model, dense = decoder(pruned), decoder(tiny.folder / "decoder")
    masks = mask_of(model, str(pruned), prunable(model_facts(f"folder:{pruned}", task="causal_lm")))
    repair = Repair(**{"r": 4, "alpha": 8.0, "learning_rate": 5e-3, "steps": 40, **changes})
    found = reconstruct(BlockChain(model, texts()), dense, masks, repair, torch.Generator().manual_seed(1))
    return model, found, masks


@pytest.mark.parametrize("small_set", ["masklora", "scalelora", "norms"])
def test_every_block_gets_closer_and_zeros_stay(tiny: Tiny, pruned: Path, small_set: str) -> None:
    model, found, masks = run(tiny, pruned, small_set=small_set)
    assert [one.block for one in found] == ["model.layers.0", "model.layers.1"]
    assert all(one.after < one.before for one in found), found
    before = decoder(pruned)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert type(model.get_submodule(name)) is torch.nn.Linear
        assert torch.equal(weight == 0, before.get_submodule(name).weight == 0) and not weight[~mask].any()
        assert torch.equal(weight, before.get_submodule(name).weight) == (small_set == "norms")
    for name, parameter in model.named_parameters():
        if "layers" not in name:
            assert torch.equal(parameter, before.get_parameter(name)), name  # embedding, last norm, head


def test_the_errors_are_those_of_the_blocks_on_repaired_inputs(tiny: Tiny, pruned: Path) -> None:
    """Computed again from whole-model passes with hooks: dense block and repaired block on the same repaired inputs."""
    model, found, _ = run(tiny, pruned)
    dense, start = decoder(tiny.folder / "decoder"), decoder(pruned)
    mixed = copy.deepcopy(model)  # block 0 repaired, block 1 as it was pruned
    mixed.model.layers[1] = start.model.layers[1]
    for place, before_model in ((0, start), (1, mixed)):
        values = {"before": [], "after": []}  # type: ignore[var-annotated]
        for batch in texts():
            for key, source in (("before", before_model), ("after", model)):
                seen: dict[str, Any] = {}

                def enter(module: Any, args: Any, kwargs: Any, seen: dict[str, Any] = seen) -> None:
                    seen["args"], seen["kwargs"] = args, kwargs

                def leave(module: Any, args: Any, out: Any, seen: dict[str, Any] = seen) -> None:
                    seen["out"] = out

                block = source.model.layers[place]
                hooks = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
                with torch.no_grad():
                    source(**batch, use_cache=False)
                    for hook in hooks:
                        hook.remove()
                    target = dense.model.layers[place](*seen["args"], **seen["kwargs"])
                values[key].append(float((seen["out"] - target).square().mean()))
        assert found[place].before == pytest.approx(sum(values["before"]) / 3, rel=1e-4)
        assert found[place].after == pytest.approx(sum(values["after"]) / 3, rel=1e-4)


def test_a_rate_that_is_far_too_high_makes_no_block_worse(tiny: Tiny, pruned: Path) -> None:
    model, found, _ = run(tiny, pruned, learning_rate=50.0, steps=3)
    assert all(one.after == one.before for one in found)
    before = decoder(pruned)
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())


def test_one_block_in_training_remembers_a_part_of_what_the_model_would(tiny: Tiny, pruned: Path) -> None:
    model, batch = decoder(pruned), texts(1)
    chain = BlockChain(model, batch)
    ours = saved_bytes(lambda: chain.run_one(0, chain.hidden[0], 0).square().mean(), model)
    theirs = saved_bytes(lambda: model(**batch[0], use_cache=False).logits.logsumexp(-1).mean(), model)
    assert ours < 0.5 * theirs, (ours, theirs)  # two blocks and the output layer


def test_the_whole_job(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    body = {**tiny.inputs("causal_lm"), "operation": "transform", "settings": {"max_length": 48},
            "methods": [{"slug": "block-reconstruction", "params": {"samples": 12, "steps": 20, "r": 4, "learning_rate": 5e-3}}],
            "models": [{"source": f"folder:{tiny.folder / 'decoder'}"}], "model": {"source": f"folder:{pruned}"}}  # fmt: skip
    folder = lay(tmp_path / "job", require(parse_recipe(body)).recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    merged = folder / "artifact" / "merged"
    record = json.loads((merged / "transform.json").read_text())["report"]
    assert all(one["after"] < one["before"] for one in record["blocks"])
    assert record["mask"]["density"] == pytest.approx(0.4, abs=1e-3)
    one, other = (load_tensors(f / "model.safetensors") for f in (pruned, merged))
    assert all(torch.equal(one[name] == 0, other[name] == 0) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(load_tensors(pruned / MASK_FILE).values(), load_tensors(merged / MASK_FILE).values(), strict=True))  # fmt: skip


def test_models_of_other_shapes_are_refused_early(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    from tests.engine.unit.tiny_models import tiny_llama

    body = {**tiny.inputs("causal_lm"), "operation": "transform", "methods": [{"slug": "block-reconstruction"}],
            "model": {"source": f"folder:{pruned}"}, "models": [{"source": f"folder:{tiny_llama(tmp_path / 'other')}"}]}  # fmt: skip
    faults = check(parse_recipe(body)).faults
    assert any(fault.code == "shapes_differ" and fault.way_out for fault in faults)
    assert BlockReconstruction.num_models == (2, 2)
