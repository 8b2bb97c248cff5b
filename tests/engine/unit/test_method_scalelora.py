"""ScaleLoRA: an exact start whose directions come apart, zeros by construction, an exact merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.io.facts import model_facts
from engine.io.tensors import load_tensors
from engine.methods.scalelora import ScaleLoRA
from engine.ops.folder import run_folder
from engine.ops.transform import transform
from engine.parts.masked import MaskedLinear, numerical_rank
from tests.engine.attached import Attached, facts_for, logits_of, random_batches
from tests.engine.tiny import Tiny, lay, metric_rows


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    transform("magnitude-pruning", {"pattern": "2:4"}, [tiny.folder / "decoder"], out)
    return out


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def attach(folder: Path, **params: Any) -> Attached:
    facts = facts_for(model_facts(f"folder:{folder}", task="causal_lm"), "causal_lm")
    return Attached(decoder(folder), ScaleLoRA(ScaleLoRA.Params(**{"r": 4, **params})), facts)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def ranks(attached: Attached) -> list[int]:
    """From the wide products themselves, not from the thin factors."""
    found = []
    for layer in masked_layers(attached.model).values():
        values = torch.linalg.svdvals((layer.lora_B @ layer.lora_A).detach().double())
        found.append(int((values > 1e-4 * values[0]).sum()))
    return found


def test_the_start_is_the_pruned_model_bit_for_bit(pruned: Path) -> None:
    attached, batch = attach(pruned), next(random_batches(400))
    for layer in masked_layers(attached.model).values():
        assert torch.equal(layer.lora_B @ layer.lora_A, torch.ones_like(layer.weight))
    assert torch.equal(attached.logits(batch), logits_of(decoder(pruned), batch))


def test_the_published_start_is_exact_without_noise_and_near_with_it(pruned: Path) -> None:
    batch = next(random_batches(400))
    base = logits_of(decoder(pruned), batch)
    torch.testing.assert_close(attach(pruned, start="equal", noise=0.0).logits(batch), base, rtol=0, atol=1e-5)
    noisy = attach(pruned, start="equal", noise=1e-3).logits(batch)
    assert 0 < (noisy - base).abs().max() < 0.05


def second(attached: Attached) -> float:
    """The second singular value over the first, in the median layer."""
    found = []
    for layer in masked_layers(attached.model).values():
        values = torch.linalg.svdvals((layer.lora_B.double() @ layer.lora_A.double()).detach())
        found.append(float(values[1] / values[0]))
    return sorted(found)[len(found) // 2]


def test_equal_components_never_come_apart_and_the_first_start_does(pruned: Path) -> None:
    """The trap of the published start: equal gradients keep r copies of one direction. Noise helps only by its square; the first start at once."""
    stuck, noisy, free = (
        attach(pruned, **params) for params in ({"start": "equal", "noise": 0.0}, {"start": "equal", "noise": 1e-2}, {})
    )
    assert set(ranks(free)) == {1}  # all ones
    for attached in (stuck, noisy, free):
        attached.train(random_batches(400), 8)
    assert set(ranks(stuck)) == {1} and min(ranks(free)) == 4
    layer = next(iter(masked_layers(stuck.model).values()))
    assert all(torch.allclose(layer.lora_A[0], layer.lora_A[k], atol=1e-5) for k in range(4))
    assert second(stuck) < 1e-6 and 10 * second(stuck) < second(noisy) < 0.1 * second(free)
    for attached in (stuck, free):
        for one, expected in zip(masked_layers(attached.model).values(), ranks(attached), strict=True):
            assert numerical_rank(one) == expected


def test_zeros_stay_and_merged_equals_unmerged(pruned: Path) -> None:
    attached, batch = attach(pruned), next(random_batches(400, seed=5))
    before = {name: layer.weight.detach() == 0 for name, layer in masked_layers(attached.model).items()}
    attached.train(random_batches(400), 6)
    measured = attached.logits(batch)
    assert attached.part.merge(attached.model)
    torch.testing.assert_close(attached.logits(batch), measured, rtol=0, atol=1e-5)
    assert not torch.allclose(measured, logits_of(decoder(pruned), batch), atol=1e-2)
    for name, zero in before.items():
        weight = attached.model.get_submodule(name).weight
        assert torch.equal(weight == 0, zero) and ((weight.view(-1, 4) != 0).sum(1) == 2).all(), name


def test_a_kept_weight_scaled_to_zero_does_not_change_the_mask(pruned: Path) -> None:
    attached = attach(pruned)
    name, layer = next(iter(masked_layers(attached.model).items()))
    assert layer.mask is not None
    mask = layer.mask.clone()
    row = int(mask.any(1).nonzero()[0])
    with torch.no_grad():
        layer.lora_B[row] = 0.0  # the whole row becomes zero
    payload = attached.part.export(attached.model)
    other = attach(pruned)
    assert payload is not None
    other.part.restore(other.model, payload)
    restored = masked_layers(other.model)[name].mask
    assert restored is not None and torch.equal(restored, mask) and bool(mask[row].any())
    assert not layer.merged()[row].any()


def test_a_whole_run_logs_the_rank_and_keeps_the_pattern(pruned: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe([("scalelora", {"r": 4}), ("clip", {}), ("linear", {})], max_steps=12)
    source = recipe.model.model_copy(update={"source": f"folder:{pruned}"})
    folder = lay(tmp_path / "job", recipe.model_copy(update={"model": source}))
    assert run_folder(folder)["outcome"] == "succeeded"
    assert json.loads((folder / "artifact" / "certificate.json").read_text())["ok"]
    logged = {row["step"]: row["numerical_rank"] for row in metric_rows(folder) if "numerical_rank" in row}
    assert logged.keys() == {1, 10} and logged[10] > 1
    after = load_tensors(folder / "artifact" / "merged" / "model.safetensors")
    before = load_tensors(pruned / "model.safetensors")
    for name in model_facts(f"folder:{pruned}", task="causal_lm").linears:
        assert torch.equal(after[f"{name}.weight"] == 0, before[f"{name}.weight"] == 0)
    described = json.loads((folder / "artifact" / "adapter" / "adapter.json").read_text())
    assert min(described["numerical_rank"].values()) >= 1 and described["density"] == 0.5


def test_counts_and_refusals(pruned: Path) -> None:
    attached = attach(pruned)
    params = ScaleLoRA.Params(r=4)
    assert ScaleLoRA.num_trainable(params, attached.facts) == attached.trainables.num_elements()
    assert ScaleLoRA.claims(params, attached.facts) == {f"{n}.weight" for n in attached.facts.model.linears}
    (fault,) = ScaleLoRA.check(ScaleLoRA.Params(r=40), attached.facts)
    assert fault.where == "r" and "32" in fault.way_out
