"""Soup, SLERP, task arithmetic and TIES against peft, against formulas written out, and against what must be refused."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

import engine.parts.merging as merging
from engine.core.errors import EngineError
from engine.core.facts import Facts, ModelFacts
from engine.core.recipe import parse_recipe
from engine.io.facts import model_facts
from engine.methods.model_soup import ModelSoup
from engine.methods.pcb_merging import PCBMerging
from engine.methods.slerp import Slerp
from engine.methods.task_arithmetic import TaskArithmetic
from engine.methods.ties_merging import TiesMerging
from engine.ops.check import check
from engine.ops.transform import ModelFolder, transform
from engine.parts.merging import kept_mask, order_statistics, top_rank
from tests.engine.attached import facts_for
from tests.engine.folders import flat, merged, random_family, write_model
from tests.engine.tiny import Tiny

TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}
WITH_BASE = ("task-arithmetic", "ties-merging", "pcb-merging")


def vectors_of(models: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    return [model[name].double() - models[0][name].double() for model in models[1:]]


# ── against peft and formulas ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", ["", "0.5, -1.5, 2"])
def test_task_arithmetic_equals_peft(tmp_path: Path, weights: str) -> None:
    models = random_family(3)
    result, report = merged(tmp_path, "task-arithmetic", models, scale=0.7, weights=weights)
    factors = torch.tensor([float(w) for w in weights.split(",")] if weights else [1.0] * 3, dtype=torch.float64)
    for name in models[0]:
        if name != "position_ids":
            expected = models[0][name] + merge_utils.task_arithmetic(vectors_of(models, name), 0.7 * factors)
            torch.testing.assert_close(result[name].double(), expected, **TOLERANCE)
    assert torch.equal(result["position_ids"], models[0]["position_ids"])
    assert list(report["weights"].values()) == [round(float(f) * 0.7, 6) for f in factors]


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_ties_within_each_tensor_equals_peft(tmp_path: Path, elect: Any, keep: float) -> None:
    models = random_family(3, seed=1)
    result, _ = merged(
        tmp_path, "ties-merging", models, keep=keep, scope="tensor", elect=elect, scale=0.9, weights="1, 0.5, 2"
    )
    for name in models[0]:
        if name == "position_ids":
            continue
        density = keep if keep < 1 else 0.9999999  # peft warns at 1 and keeps everything as well
        expected = merge_utils.ties(vectors_of(models, name), torch.tensor([1.0, 0.5, 2.0]), density, elect)
        if keep == 1:
            expected = merge_utils.disjoint_merge(
                torch.stack(vectors_of(models, name))
                * torch.tensor([1.0, 0.5, 2.0]).view(3, *[1] * models[0][name].dim()),
                merge_utils.calculate_majority_sign_mask(torch.stack(vectors_of(models, name)), elect),
            )
        torch.testing.assert_close(result[name].double(), models[0][name] + 0.9 * expected, **TOLERANCE)


def test_ties_over_the_whole_model_equals_the_flat_formula(tmp_path: Path) -> None:
    models = random_family(4, seed=2)
    result, report = merged(tmp_path, "ties-merging", models, keep=0.2, scale=1.0)
    base = flat(models[0], models[0])
    taus = torch.stack([flat(model, models[0]) - base for model in models[1:]])
    size = taus.shape[1]
    for tau in taus:  # brute force: sort, cut, elect, average, place by place
        tau[tau.abs().argsort()[: size - round(0.2 * size)]] = 0
    expected = torch.zeros(size, dtype=torch.float64)
    for place in range(size):
        column = taus[:, place]
        sign = 1 if column.sum() >= 0 else -1
        winners = [float(value) for value in column if value * sign > 0]
        expected[place] = sum(winners) / max(1, len(winners))
    torch.testing.assert_close(flat(result, models[0]), base + expected, **TOLERANCE)
    assert all(share == pytest.approx(round(0.2 * size) / size, abs=1e-6) for share in report["kept"].values())


def test_dropping_equals_peft_with_the_same_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = random_family(2, seed=3)
    linear, _ = merged(tmp_path, "task-arithmetic", models, scale=1.0, drop=0.7, drop_seed=5)
    ties, _ = merged(tmp_path, "ties-merging", models, keep=0.3, trim="random", trim_seed=5)
    for name in models[0]:
        if name == "position_ids":
            continue
        masks = iter([kept_mask(5, f"{place}/{name}", models[0][name].numel(), 0.7) for place in range(2)] * 2)
        monkeypatch.setattr(
            torch, "bernoulli", lambda chance, masks=masks: next(masks).reshape(chance.shape).to(chance.dtype)
        )
        taus, ones = vectors_of(models, name), torch.ones(2)
        torch.testing.assert_close(
            linear[name].double(), models[0][name] + merge_utils.dare_linear(taus, ones, 0.3), rtol=0, atol=2e-6
        )
        torch.testing.assert_close(
            ties[name].double(), models[0][name] + merge_utils.dare_ties(taus, ones, 0.3), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize(("weights", "normalize"), [("", True), ("1, 2, 5", True), ("0.5, 0.5, 0.5", False)])
def test_soup_is_the_weighted_mean(tmp_path: Path, weights: str, normalize: bool) -> None:
    models = random_family(2, seed=4)
    result, _ = merged(tmp_path, "model-soup", models, weights=weights, normalize=normalize)
    factors = [float(w) for w in weights.split(",")] if weights else [1.0] * 3
    whole = sum(factors) if normalize else 1.0
    expected = sum(flat(model, models[0]) * (factor / whole) for model, factor in zip(models, factors, strict=True))
    torch.testing.assert_close(flat(result, models[0]), expected, **TOLERANCE)
    assert torch.equal(result["position_ids"], models[0]["position_ids"])


def test_the_soup_of_one_model_twice_is_that_model_bit_for_bit(tmp_path: Path) -> None:
    model = random_family(0, dtype=torch.bfloat16)[0]
    result, _ = merged(tmp_path, "model-soup", [model, model])
    assert all(torch.equal(result[name], model[name]) for name in model)


@pytest.mark.parametrize("angle", ["tensor", "model"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_follows_the_arc(tmp_path: Path, t: float, angle: Any) -> None:
    models = random_family(1, seed=5, spread=1.0)
    result, report = merged(tmp_path, "slerp", models, t=t, angle=angle)
    for name in models[0]:
        if name == "position_ids":
            continue
        first, second = (model[name].double().flatten() for model in models)
        one, other = (first, second) if angle == "tensor" else (flat(model, models[0]) for model in models)
        omega = math.acos(float(one @ other / (one.norm() * other.norm())))
        expected = (math.sin((1 - t) * omega) * first + math.sin(t * omega) * second) / math.sin(omega)
        torch.testing.assert_close(result[name].double().flatten(), expected, **TOLERANCE)
    assert report["blended_straight"] == 0


def test_slerp_keeps_the_length_and_goes_straight_between_parallels(tmp_path: Path) -> None:
    one = {"layers.0.w": torch.tensor([3.0, 0.0]), "layers.1.w": torch.tensor([1.0, 1.0]), "layers.2.w": torch.zeros(2)}
    other = {
        "layers.0.w": torch.tensor([0.0, 3.0]),
        "layers.1.w": torch.tensor([2.0, 2.0]),
        "layers.2.w": torch.ones(2),
    }
    result, report = merged(tmp_path, "slerp", [one, other], t=0.5)
    assert result["layers.0.w"].norm() == pytest.approx(3.0, abs=1e-6)
    assert result["layers.1.w"].tolist() == pytest.approx([1.5, 1.5])
    assert result["layers.2.w"].tolist() == pytest.approx([0.5, 0.5])
    assert report == {"blended_straight": 2, "blended_along_the_arc": 1}


# ── what all of them share ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slug", WITH_BASE)
def test_the_order_of_the_models_does_not_matter(tmp_path: Path, slug: str) -> None:
    base, *tuned = random_family(3, seed=6)
    one, _ = merged(tmp_path, slug, [base, *tuned])
    other, _ = merged(tmp_path, slug, [base, *reversed(tuned)])
    torch.testing.assert_close(flat(one, base), flat(other, base), **TOLERANCE)


@pytest.mark.parametrize("slug", (*WITH_BASE, "model-soup", "slerp"))
def test_a_weight_stored_twice_is_merged_once_and_written_twice(tmp_path: Path, slug: str) -> None:
    models = random_family(1, seed=7)
    alone, _ = merged(tmp_path, slug, models)
    for model in models:
        model["lm_head.weight"] = model["embed.weight"].clone()
    tied, _ = merged(tmp_path, slug, models)
    assert torch.equal(tied["lm_head.weight"], tied["embed.weight"])
    assert all(torch.equal(tied[name], alone[name]) for name in alone)  # quantiles over the model count it once


@pytest.mark.parametrize("slug", (*WITH_BASE, "model-soup", "slerp"))
def test_half_precision_is_computed_in_fp32_and_rounded_once(tmp_path: Path, slug: str) -> None:
    models = random_family(1, seed=8, dtype=torch.bfloat16)
    result, _ = merged(tmp_path, slug, models)
    wide, _ = merged(
        tmp_path, slug, [{n: t.float() if t.is_floating_point() else t for n, t in m.items()} for m in models]
    )
    assert all(result[name].dtype == models[0][name].dtype for name in result)
    assert all(torch.equal(result[name], wide[name].to(result[name].dtype)) for name in result)


def test_mixed_types_take_the_wider_one(tmp_path: Path) -> None:
    base, tuned = random_family(1, seed=9)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in base.items()}
    result, _ = merged(tmp_path, "task-arithmetic", [half, tuned], scale=1.0)
    assert result["embed.weight"].dtype == torch.float32
    torch.testing.assert_close(flat(result, base), flat(tuned, base), **TOLERANCE)


def test_pruned_models_are_read_through_their_index(tmp_path: Path) -> None:
    base, tuned = random_family(1, seed=10)
    whole = [write_model(tmp_path / name, model) for name, model in (("base", base), ("tuned", tuned))]
    sharded = tmp_path / "sharded"
    halves = [dict(list(tuned.items())[:4]), dict(list(tuned.items())[4:])]
    for number, half in enumerate(halves):
        part = write_model(tmp_path / f"half-{number}", half)
        sharded.mkdir(exist_ok=True)
        (part / "model.safetensors").rename(sharded / f"model-{number}.safetensors")
    index = {name: f"model-{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    transform("task-arithmetic", {}, whole, tmp_path / "one")
    transform("task-arithmetic", {}, [whole[0], sharded], tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize("slug", (*WITH_BASE, "model-soup", "slerp"))
def test_never_more_than_one_tensor_of_each_model_is_in_memory(
    tmp_path: Path, slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{f"layers.{i}.w": torch.randn(64, 64) for i in range(12)} for _ in range(2)]
    live = {"now": 0, "peak": 0}
    read = ModelFolder.__getitem__

    def spy(self: ModelFolder, name: str) -> Tensor:
        tensor = read(self, name)
        size = tensor.untyped_storage().nbytes()
        live["now"] += size
        live["peak"] = max(live["peak"], live["now"])
        weakref.finalize(tensor.untyped_storage(), lambda: live.__setitem__("now", live["now"] - size))
        return tensor

    monkeypatch.setattr(ModelFolder, "__getitem__", spy)
    merged(tmp_path, slug, models)
    assert 0 < live["peak"] <= 3 * 64 * 64 * 4  # of 12 tensors in each of the two models


# ── exact ranks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_over_pieces_are_those_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 5000, generator=generator) * 10.0 ** torch.randint(-30, 30, (3, 5000), generator=generator)
    values[0, :50], values[1, :10], values[1, 10:20] = 0.0, -0.0, values[1, 30].clone()
    ranks = [1, 2, 50, 2500, 4999, 5000]
    found = order_statistics(lambda: values.split(700, dim=1), ranks)
    assert torch.equal(found, values.sort(1).values[:, [rank - 1 for rank in ranks]])


def test_ranks_need_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        order_statistics(lambda: [], [1])


@pytest.mark.parametrize(("size", "share", "left"), [(1000, 0.05, 50), (999, 0.1, 100), (10, 1.0, 9), (3, 0.001, 0)])
def test_the_share_above_the_rank(size: int, share: float, left: int) -> None:
    assert size - top_rank(size, share) == left


def test_masks_repeat_differ_by_name_and_are_nested() -> None:
    one = kept_mask(3, "a", 100_000, 0.9)
    assert torch.equal(one, kept_mask(3, "a", 100_000, 0.9))
    assert not torch.equal(one, kept_mask(3, "b", 100_000, 0.9)) and not torch.equal(
        one, kept_mask(4, "a", 100_000, 0.9)
    )
    fewer = kept_mask(3, "a", 100_000, 0.99)
    assert bool((fewer <= one).all()) and 0 < int(fewer.sum()) < int(one.sum())


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(home: Path, slug: str, models: list[dict[str, Tensor]], **params: Any) -> str:
    with pytest.raises(EngineError) as caught:
        merged(home, slug, models, **params)
    assert caught.value.reason == "bad_input" and caught.value.fault.why and caught.value.fault.way_out
    assert not list(home.glob("out-*")) and not list(home.glob(".out-*"))
    return f"{caught.value.fault.code}: {caught.value}"


@pytest.mark.parametrize("slug", (*WITH_BASE, "model-soup", "slerp"))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_its_name(tmp_path: Path, slug: str, bad: float) -> None:
    models = random_family(1)
    models[1]["layers.1.up.weight"][2, 3] = bad
    text = refusal(tmp_path, slug, models)
    assert text.startswith("not_finite") and "layers.1.up.weight" in text and "in-0-1" in text


@pytest.mark.parametrize("slug", (*WITH_BASE, "model-soup", "slerp"))
def test_other_shapes_or_layers_are_refused(tmp_path: Path, slug: str) -> None:
    base, tuned = random_family(1)
    wider = {**tuned, "layers.0.q.weight": torch.zeros(9, 8)}
    assert "layers.0.q.weight has the shape [9, 8] instead of [8, 8]" in refusal(tmp_path / "a", slug, [base, wider])
    deeper = {**tuned, "layers.2.q.weight": torch.zeros(8, 8)}
    assert "layers.2.q.weight is only there" in refusal(tmp_path / "b", slug, [base, deeper])
    other = {"layers.7.odd": torch.zeros(3)}
    assert refusal(tmp_path / "c", slug, [base, other]).startswith("shapes_differ")


@pytest.mark.parametrize("slug", WITH_BASE)
def test_heads_that_differ_are_refused_or_taken_from_whom_one_says(tmp_path: Path, slug: str) -> None:
    base, *tuned = random_family(2)
    tuned[0]["head.weight"], tuned[1]["head.weight"] = torch.ones(3, 8), torch.ones(4, 8)
    text = refusal(tmp_path / "no", slug, [base, *tuned])
    assert text.startswith("heads_differ") and "head.weight" in text
    of_base, report = merged(tmp_path / "base", slug, [base, *tuned], heads="base")
    of_first, _ = merged(tmp_path / "first", slug, [base, *tuned], heads="first")
    assert torch.equal(of_base["head.weight"], base["head.weight"]) and report["not_merged"] == ["head.weight"]
    assert torch.equal(of_first["head.weight"], tuned[0]["head.weight"])
    assert all(
        torch.equal(of_base[name], of_first[name]) for name in of_base if name not in ("head.weight", "position_ids")
    )
    assert torch.equal(of_first["position_ids"], base["position_ids"])
    settings = [json.loads((tmp_path / who / "out-0/config.json").read_text())["name"] for who in ("base", "first")]
    assert settings == ["in-0-0", "in-0-1"]


def test_a_new_head_and_a_prefix_are_understood(tmp_path: Path) -> None:
    base, tuned = random_family(1)
    del base["head.weight"]
    longer = {f"bert.{name}" if name != "head.weight" else name: value for name, value in tuned.items()}
    result, _ = merged(tmp_path, "task-arithmetic", [base, longer], heads="first", scale=0.5)
    assert result.keys() == longer.keys() and torch.equal(result["head.weight"], tuned["head.weight"])
    expected = (base["layers.0.q.weight"] + tuned["layers.0.q.weight"]) / 2
    torch.testing.assert_close(result["bert.layers.0.q.weight"], expected, **TOLERANCE)
    body, _ = merged(tmp_path, "task-arithmetic", [base, longer], heads="base", scale=0.5)
    assert body.keys() == base.keys() and torch.equal(body["layers.0.q.weight"], result["bert.layers.0.q.weight"])


@pytest.mark.parametrize("slug", WITH_BASE)
def test_a_tuned_model_that_is_the_base_is_refused(tmp_path: Path, slug: str) -> None:
    base, tuned = random_family(1)
    text = refusal(tmp_path, slug, [base, tuned, base])
    assert text.startswith("no_difference") and "in-0-2" in text


def test_numbers_of_models_and_of_weights(tmp_path: Path) -> None:
    models = random_family(2)
    for slug, count in (("slerp", 3), ("slerp", 1), ("model-soup", 1), ("task-arithmetic", 1), ("ties-merging", 1)):
        assert refusal(tmp_path, slug, models[:count]).startswith("wrong_number"), slug
    assert refusal(tmp_path, "task-arithmetic", models, weights="1, 2, 3").startswith("wrong_number")
    assert refusal(tmp_path, "model-soup", models, weights="1, -1, 0").startswith("zero_sum")
    for text in ("a, b", "nan", "1e9", "inf, 1"):
        _, faults = TaskArithmetic.parse({"weights": text}, "params")
        assert faults and faults[0].where == "params.weights" and faults[0].why.endswith("."), text


def facts_of(tiny: Tiny, *others: ModelFacts) -> Facts:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    return Facts(**{**vars(facts), "models": others})


@pytest.mark.parametrize("method", [ModelSoup, Slerp, TaskArithmetic, TiesMerging, PCBMerging])
def test_shapes_are_compared_before_anything_is_read(method: Any, tiny: Tiny) -> None:
    mine = model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")
    name = "model.layers.1.mlp.up_proj.weight"
    other = ModelFacts(**{**vars(mine), "tensors": {**mine.tensors, name: (3, 3)}})
    verdict = method.supports(facts_of(tiny, other))
    assert not verdict.ok and name in verdict.why and verdict.way_out
    assert method.supports(facts_of(tiny, mine)).ok and method.supports(facts_of(tiny)).ok


def test_a_recipe_is_checked_as_a_whole(tiny: Tiny) -> None:
    source = {"source": f"folder:{tiny.folder / 'decoder'}"}
    recipe = {"operation": "transform", "task": "causal_lm", "model": source}
    (fault,) = check(parse_recipe({**recipe, "methods": [{"slug": "slerp"}]})).faults
    assert fault.code == "wrong_number"
    both = {**recipe, "models": [source]}
    (fault,) = check(parse_recipe({**both, "methods": [{"slug": "ties-merging", "params": {"weights": "1,2"}}]})).faults
    assert fault.where == "methods[0].params.weights"
    bad = {"slug": "pcb-merging", "params": {"search": True, "search_low": 1.2, "search_high": 1.0}}
    faults = check(parse_recipe({**both, "methods": [bad]})).faults
    assert [fault.code for fault in faults] == ["no_data", "empty_range"]
    assert faults[0].where == "methods[0].params.search"
    assert not check(parse_recipe({**both, "methods": [{"slug": "model-soup"}]})).faults
    assert merging.numbers("1, 2;3") == (1, 2, 3)
