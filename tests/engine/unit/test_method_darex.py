"""DAREx: masks, exact rebuilding, divisors against brute force, searches on real small models, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.core.recipe import parse_recipe
from engine.methods.darex import DAREx
from engine.ops.check import check
from engine.ops.transform import ModelFolder, OutFolder, TransformContext, transform
from engine.parts.delta_codec import DeltaReader, restore
from engine.parts.divisors import bound_divisors, optimal_divisors, search_divisor
from engine.parts.merging import kept_mask, layer_of, part_of
from tests.engine.folders import merged, random_family, write_model
from tests.engine.tiny import Tiny

ALL = {"drop_embeddings": True, "drop_vectors": True, "drop_heads": True}


# ── the mask and what is rebuilt ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("drop", [0.5, 0.9, 0.99])
def test_the_kept_share_is_one_minus_p_within_four_sigma(tmp_path: Path, drop: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"layers.0.w": torch.randn(300, 300, generator=generator)}
    tuned = {"layers.0.w": base["layers.0.w"] + torch.randn(300, 300, generator=generator)}
    result, report = merged(tmp_path, "darex", [base, tuned], drop=drop)
    moved = (result["layers.0.w"] != base["layers.0.w"]).float().mean()
    sigma = math.sqrt(drop * (1 - drop) / 90_000)
    assert abs(float(moved) - (1 - drop)) < 4 * sigma and report["kept"] == pytest.approx(float(moved), abs=1e-6)
    assert (
        report["weight_error"] == pytest.approx(drop / (1 - drop), rel=0.15) and report["weight_error_of_drop_all"] == 1
    )


def test_the_mean_over_many_masks_is_the_change(tmp_path: Path) -> None:
    base, tuned = random_family(1)
    name, masks, drop = "layers.0.up.weight", 4000, 0.75
    delta = (tuned[name] - base[name]).flatten()
    total = torch.zeros_like(delta)
    for seed in range(masks):
        total += delta * kept_mask(seed, name, delta.numel(), drop) / (1 - drop)
    spread = delta.abs() * math.sqrt(drop / (1 - drop) / masks)
    assert bool(((total / masks - delta).abs() <= 5 * spread + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["exact", "fp32"])
def test_nothing_dropped_rebuilds_the_fine_tuned_model(tmp_path: Path, dtype: torch.dtype, values: str) -> None:
    base, tuned = random_family(1, dtype=dtype, spread=3.0)
    result, report = merged(tmp_path, "darex", [base, tuned], drop=0.0, values=values, **ALL)
    if values == "exact":
        assert all(torch.equal(result[name], tuned[name]) for name in tuned) and report["weight_error"] == 0
    else:
        assert all(torch.allclose(result[name], tuned[name], rtol=0, atol=1e-6) for name in tuned)
    assert report["kept"] == 1


def test_a_huge_divisor_gives_the_base(tmp_path: Path) -> None:
    base, tuned = random_family(1)
    result, _ = merged(tmp_path, "darex", [base, tuned], drop=0.9, rescale="fixed", q=1e9, **ALL)
    for name, value in base.items():
        if value.is_floating_point():
            torch.testing.assert_close(result[name], value, rtol=0, atol=1e-7)
    assert torch.equal(result["position_ids"], tuned["position_ids"])  # no weight: stays as fine-tuned


def test_every_divisor_has_the_same_mask_and_peft_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = random_family(1)
    results = {q: merged(tmp_path, "darex", [base, tuned], drop=0.8, rescale="fixed", q=q)[0] for q in (0.2, 0.3, 0.9)}
    dare, _ = merged(tmp_path, "darex", [base, tuned], drop=0.8, rescale="dare")
    for name in ("layers.0.q.weight", "layers.1.up.weight"):
        moved = {q: result[name] != base[name] for q, result in results.items()}
        assert all(torch.equal(mask, moved[0.2]) for mask in moved.values())
        assert torch.equal(moved[0.2].flatten(), kept_mask(17, name, base[name].numel(), 0.8))
        mask = moved[0.2].float()
        monkeypatch.setattr(torch, "bernoulli", lambda chance, mask=mask: mask)
        expected = merge_utils.random_pruning(tuned[name] - base[name], 0.2, rescale=True)
        torch.testing.assert_close(dare[name] - base[name], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(results[0.3][name] - base[name], expected * 0.2 / 0.3, rtol=1e-5, atol=1e-6)


def test_the_mask_does_not_depend_on_the_other_tensors(tmp_path: Path) -> None:
    base, tuned = random_family(1)
    whole, _ = merged(tmp_path, "darex", [base, tuned])
    few = ["layers.1.up.weight", "layers.0.q.weight"]
    part, _ = merged(tmp_path, "darex", [{n: base[n] for n in few}, {n: tuned[n] for n in few}])
    assert all(torch.equal(whole[name], part[name]) for name in few)
    other, _ = merged(tmp_path, "darex", [base, tuned], mask_seed=18)
    assert not torch.equal(other[few[0]], whole[few[0]])


def test_word_table_norms_and_heads_stay_fine_tuned_unless_told(tmp_path: Path) -> None:
    base, tuned = random_family(1)
    result, report = merged(tmp_path, "darex", [base, tuned])
    for name in ("embed.weight", "layers.0.norm.weight", "head.weight", "position_ids"):
        assert torch.equal(result[name], tuned[name]), name
    assert not torch.equal(result["layers.0.q.weight"], tuned["layers.0.q.weight"])
    assert report["thinned_numbers"] == 2 * (64 + 128) and report["whole_numbers"] == 240 + 8 + 40
    for dial, name in (
        ("drop_embeddings", "embed.weight"),
        ("drop_vectors", "layers.0.norm.weight"),
        ("drop_heads", "head.weight"),
    ):
        result, _ = merged(tmp_path, "darex", [base, tuned], drop=0.5, **{dial: True})
        moved = result[name] != base[name]
        assert torch.equal(moved.flatten(), kept_mask(17, name, moved.numel(), 0.5)), name


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (8, 8), "matrix"),
        ("model.embed_tokens.weight", (9, 8), "embedding"),
        ("lm_head.weight", (9, 8), "head"),
        ("bert.embeddings.word_embeddings.weight", (9, 8), "embedding"),
        ("bert.encoder.layer.0.output.LayerNorm.bias", (8,), "vector"),
        ("classifier.bias", (3,), "head"),
        ("transformer.wte.weight", (9, 8), "embedding"),
        ("encoder.layers.1.heads.weight", (8, 8), "matrix"),
    ],
)
def test_the_part_of_a_weight(name: str, shape: tuple[int, ...], part: str) -> None:
    assert part_of(name, shape) == part


def test_the_layer_of_a_weight() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12" and layer_of("lm_head.weight") == ""


# ── the delta beside the model ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("positions", ["stored", "redrawn"])
@pytest.mark.parametrize("values", ["exact", "fp32", "fp16", "bf16"])
def test_base_and_delta_give_the_written_model_bit_for_bit(tmp_path: Path, positions: str, values: str) -> None:
    base, tuned = random_family(1)
    for model in (base, tuned):
        model["lm_head.weight"] = model["embed.weight"].clone()
    tuned["classifier.weight"] = torch.ones(3, 8)
    tuned["layers.1.norm.weight"] = base["layers.1.norm.weight"] = torch.ones(8)
    result, _ = merged(tmp_path, "darex", [base, tuned], drop=0.8, positions=positions, values=values, **ALL)
    out = tmp_path / "again"
    out.mkdir()
    with ModelFolder(tmp_path / "in-0-0", "model") as model:
        restore(tmp_path / "out-0" / "delta", model, OutFolder(out))
    again = load_file(out / "model.safetensors")
    assert again.keys() == result.keys() and all(torch.equal(again[name], result[name]) for name in result)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "out-0" / "model.safetensors").read_bytes()
    with DeltaReader(tmp_path / "out-0" / "delta") as reader:
        forms = {name: entry["form"] for name, entry in reader.entries.items()}
        assert reader.about["drop"] == 0.8 and reader.about["torch"] == torch.__version__
    assert forms["lm_head.weight"] == "twin" and forms["classifier.weight"] == "whole"
    assert torch.equal(result["lm_head.weight"], result["embed.weight"])
    assert json.loads((tmp_path / "out-0/config.json").read_text())["name"] == "in-0-1"  # of the fine-tuned model


def test_bytes_of_the_delta_at_each_share(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    base = {f"layers.{i}.w": torch.randn(400, 400, generator=generator) for i in range(2)}
    tuned = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    dense = 2 * 400 * 400 * 4
    for drop in (0.5, 0.9, 0.95, 0.99):
        _, stored = merged(tmp_path, "darex", [base, tuned], drop=drop)
        _, redrawn = merged(tmp_path, "darex", [base, tuned], drop=drop, positions="redrawn")
        _, half = merged(tmp_path, "darex", [base, tuned], drop=drop, positions="redrawn", values="fp16")
        kept = stored["kept"] * 320_000
        assert stored["bytes_of_whole_delta"] == dense
        assert kept * 5 < stored["bytes_of_delta"] < kept * 5.2 + 2500  # 4 bytes a value, a little over 1 a position
        assert kept * 4 < redrawn["bytes_of_delta"] < kept * 4 + 2500
        assert kept * 2 < half["bytes_of_delta"] < kept * 2 + 2500


# ── divisors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_optimum_is_that_of_a_grid() -> None:
    c = torch.randn(6, 50, generator=torch.Generator().manual_seed(3)) + torch.linspace(0, 2, 6).unsqueeze(1)
    for drop in (0.5, 0.9, 0.99):
        found = optimal_divisors(c, drop)
        for row, q in zip(c.double(), found.tolist(), strict=True):
            grid = torch.linspace(1 - drop, 1, 100_001, dtype=torch.float64)
            error = ((1 - drop) / grid - 1) ** 2 * row.sum() ** 2 + drop * (1 - drop) / grid**2 * row.square().sum()
            assert q == pytest.approx(float(grid[error.argmin()]), abs=2e-5)
    assert optimal_divisors(torch.zeros(2, 4), 0.9).tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("drop", [0.5, 0.9, 0.99])
def test_the_bound_is_minimised_as_written(drop: float) -> None:
    c = torch.randn(10, 40, generator=torch.Generator().manual_seed(4)) + 0.3
    eta, g = 0.5, 0.95
    phi = 0.5 if drop == 0.5 else (1 - 2 * drop) / math.log((1 - drop) / drop)
    stops, ends = [], []
    for row in c.double():
        total, squares = float(row.sum()), float(row.square().sum())

        def bound(q: float, total: float = total, squares: float = squares) -> float:
            return abs(
                eta * (1 - (1 - drop) / q) * total + eta**2 * phi * squares / (4 * q * q) + math.log(2 / (1 - g))
            )

        qs = [1 - drop + k * 0.001 for k in range(round(drop / 0.001) + 1)]
        rise = next((k for k in range(1, len(qs)) if bound(qs[k]) > bound(qs[k - 1])), None)
        stops.append(rise if rise is not None else len(qs))
        ends.append(qs[rise - 1] if rise is not None else qs[-1])
    enough = sorted(stops)[math.ceil(0.8 * len(stops)) - 1]  # the walk ends here for everybody
    expected = [q if k <= enough else 1 - drop + min(enough, round(drop / 0.001)) * 0.001 for k, q in zip(stops, ends)]
    assert bound_divisors(c, drop, eta=eta, confidence=g).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("coherence", "low", "high"), [(0.05, 30, 100), (0.0, 80, 130)])
def test_a_single_random_layer_errs_far_less_at_its_optimum(coherence: float, low: float, high: float) -> None:
    """The card's bound at p = 0.99: the squared output error at q = 1 - p is 30 to 100 times that at q*, more still without any coherence."""
    generator = torch.Generator().manual_seed(5)
    delta = 0.02 * (torch.randn(256, 512, generator=generator) + coherence)
    x = torch.randn(200, 512, generator=generator) + 1.0
    q = optimal_divisors(delta * x.mean(0), 0.99)
    plain, best = 0.0, 0.0
    for seed in range(20):
        thinned = delta * kept_mask(seed, "w", delta.numel(), 0.99).view_as(delta)
        plain += float(((thinned / 0.01 - delta) @ x.T).square().sum())
        best += float(((thinned / q.unsqueeze(1) - delta) @ x.T).square().sum())
    print(f"error at 1 - p over error at the optimum: {plain / best:.1f}")
    assert low < plain / best < high


@pytest.mark.parametrize("best", [0.01, 0.03, 0.4, 1.0])
def test_the_search_walks_coarse_then_fine(best: float) -> None:
    asked: list[float] = []

    def score(q: float) -> float:
        asked.append(q)
        return abs(math.log(q / best))

    found, seen = search_divisor(score, 0.99, 10)
    assert found == pytest.approx(best, rel=0.03) and len(asked) == len(set(asked)) == len(seen) <= 30
    assert min(asked) >= 0.01 * (1 - 1e-5) and max(asked) <= 1
    assert search_divisor(score, 0.0, 10)[0] == 1.0


# ── with examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Small(nn.Module):
    """Two layers; the middle one has a number in its name, as layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 24), nn.Linear(24, 24)])
        self.classifier = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.classifier(x)


class Rows(TransformContext):
    """A context with examples for the small network."""

    def __init__(self, folders: list[Path]) -> None:
        super().__init__()
        self.folders, self.recipe = folders, SimpleNamespace(data=object())
        self.task = SimpleNamespace(
            model_kinds=("decoder",), forward_logits=lambda model, batch: (model(batch["x"]), batch["labels"])
        )
        generator = torch.Generator().manual_seed(6)
        x = torch.rand(64, 12, generator=generator)
        with torch.no_grad():
            labels = self.load_model(1)(x).argmax(1)
        self.batches = [{"x": x[:32], "labels": labels[:32]}, {"x": x[32:], "labels": labels[32:]}]
        self.asked: list[tuple[int, int | None]] = []

    def calibration(self, num: int, length: int | None = None) -> list[dict[str, Tensor]]:
        self.asked.append((num, length))
        return self.batches

    def load_model(self, index: int = 0) -> nn.Module:
        model = Small()
        model.load_state_dict(load_file(self.folders[index] / "model.safetensors"))
        return model


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    torch.manual_seed(7)
    base, tuned = Small().state_dict(), Small().state_dict()
    return [
        write_model(tmp_path / "base", base),
        write_model(tmp_path / "tuned", {n: base[n] + 0.5 * tuned[n] for n in base}),
    ]


def apply(folders: list[Path], out: Path, **params: Any) -> tuple[dict[str, Tensor], Rows]:
    out.mkdir()
    ctx = Rows(folders)
    with ModelFolder(folders[0], "model") as base, ModelFolder(folders[1], "models[0]") as tuned:
        DAREx(DAREx.Params(**params)).apply([base, tuned], OutFolder(out), ctx)
    return load_file(out / "model.safetensors"), ctx


def direct(folders: list[Path], drop: float, q: Any, seed: int = 17) -> dict[str, Tensor]:
    base, tuned = (load_file(folder / "model.safetensors") for folder in folders)
    result = dict(tuned)
    for name in ("layers.0.weight", "layers.1.weight"):
        mask = kept_mask(seed, name, base[name].numel(), drop).view_as(base[name])
        divisor = q[name].unsqueeze(1) if isinstance(q, dict) else q
        result[name] = base[name] + mask * (tuned[name] - base[name]) / divisor
    return result


@pytest.mark.parametrize("rule", ["outputs", "validation"])
def test_the_search_measures_what_the_network_answers(folders: list[Path], tmp_path: Path, rule: str) -> None:
    result, ctx = apply(folders, tmp_path / "out", drop=0.9, rescale=rule, masks=4, tries=6)
    q = ctx.report["divisor"]
    tried = {float(key): value for key, value in ctx.report["tried"]["model"].items()}
    assert 0.1 <= q <= 1 and tried[min(tried, key=lambda key: tried[key])] == tried[q]
    model, goal = Small(), ctx.load_model(1)

    def measured(q: float) -> float:
        found = []
        for number in range(4 if rule == "outputs" else 1):
            model.load_state_dict(direct(folders, 0.9, q, 17 + number * 1_000_003))
            x = torch.cat([batch["x"] for batch in ctx.batches])
            labels = torch.cat([batch["labels"] for batch in ctx.batches])
            with torch.no_grad():
                if rule == "outputs":
                    found.append(float((model(x) - goal(x)).square().mean()))
                else:
                    found.append(float(nn.functional.cross_entropy(model(x), labels)))
        if len(found) > 2:
            found.remove(max(found, key=lambda value: abs(value - sorted(found)[2])))
        return sum(found) / len(found)

    for one in (0.1, q):
        assert tried[one] == pytest.approx(measured(one), rel=1e-4)
    expected = direct(folders, 0.9, q)
    assert all(torch.allclose(result[name], expected[name], atol=1e-6) for name in expected)
    assert ctx.asked == [(50, 128)]


def test_the_control_is_always_reported(folders: list[Path], tmp_path: Path) -> None:
    _, ctx = apply(folders, tmp_path / "a", drop=0.95, rescale="dare")
    control = ctx.report["control"]
    assert control.keys() == {"fine_tuned", "drop_all", "dare", "result"} and control["dare"] == control["result"]
    model = Small()
    model.load_state_dict(direct(folders, 0.95, float("inf")))
    x, labels = (torch.cat([batch[key] for batch in ctx.batches]) for key in ("x", "labels"))
    with torch.no_grad():
        assert control["drop_all"]["loss"] == pytest.approx(
            float(nn.functional.cross_entropy(model(x), labels)), abs=1e-5
        )
    assert control["fine_tuned"]["distance"] == 0 and any("every change dropped" in note for note in ctx.notes)
    _, ctx = apply(folders, tmp_path / "b", drop=0.95)
    assert ctx.report["rescale"] == "outputs"  # auto, since there are examples
    assert ctx.report["control"]["result"]["distance"] <= control["dare"]["distance"]


def test_the_analytic_divisors_come_from_the_inputs_of_each_layer(folders: list[Path], tmp_path: Path) -> None:
    result, ctx = apply(folders, tmp_path / "out", drop=0.9, rescale="analytic")
    base, tuned = (load_file(folder / "model.safetensors") for folder in folders)
    x = torch.cat([batch["x"] for batch in ctx.batches])
    divisors = {}
    with torch.no_grad():
        for place, layer in enumerate(ctx.load_model(1).layers):
            name = f"layers.{place}.weight"
            divisors[name] = optimal_divisors((tuned[name] - base[name]) * x.mean(0), 0.9)
            x = layer(x).relu()
    expected = direct(folders, 0.9, divisors)
    assert all(torch.allclose(result[name], expected[name], atol=1e-5) for name in expected)
    result, ctx = apply(folders, tmp_path / "bound", drop=0.9, rescale="analytic", form="bound", drop_vectors=True)
    found = ctx.report["divisor"]
    mean = (found["layers.0.weight"] + found["layers.1.weight"]) / 2
    assert found["layers.0.bias"] == pytest.approx(mean, abs=1e-5)  # both layers have 24 rows


def test_one_divisor_for_each_layer(folders: list[Path], tmp_path: Path) -> None:
    _, ctx = apply(folders, tmp_path / "out", drop=0.95, rescale="outputs", scope="layer", tries=5, masks=2)
    assert ctx.report["tried"].keys() == {"layers.0", "layers.1"}
    assert ctx.report["control"]["result"]["distance"] <= ctx.report["control"]["dare"]["distance"]


def test_a_real_decoder_in_a_job(tiny: Tiny, tmp_path: Path) -> None:
    """Through a recipe with data: searched divisor, control in the report, an artifact that is certified."""
    from engine.ops.folder import run_folder
    from tests.engine.tiny import lay

    weights = load_file(tiny.folder / "decoder" / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    transform("model-soup", {}, [tiny.folder / "decoder"] * 2, tmp_path / "tuned")
    write_model(
        tmp_path / "tuned",
        {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in weights.items()},
        json.loads((tiny.folder / "decoder" / "config.json").read_text()),
    )
    recipe = parse_recipe(
        {
            **tiny.inputs("causal_lm"), "operation": "transform", "models": [{"source": f"folder:{tmp_path / 'tuned'}"}],
            "methods": [{"slug": "darex", "params": {"drop": 0.9, "rescale": "outputs", "tries": 3, "masks": 2, "rows": 8, "row_length": 32}}],
        }
    )  # fmt: skip
    folder = lay(tmp_path / "job", recipe)
    outcome = run_folder(folder)
    assert outcome["outcome"] == "succeeded", outcome
    body = json.loads((folder / "artifact" / "artifact.json").read_text())
    assert body["report"]["control"]["drop_all"]["loss"] > 0
    assert (folder / "artifact" / "merged" / "delta" / "delta.json").is_file()


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_refusals(tiny: Tiny, tmp_path: Path) -> None:
    base, tuned = random_family(1)
    for params, code in (
        ({"rescale": "outputs"}, "no_data"),
        ({"rescale": "fixed", "q": 0.01, "drop": 0.9}, "divisor_too_small"),
    ):
        with pytest.raises(EngineError) as caught:
            merged(tmp_path / code, "darex", [base, tuned], **params)
        assert caught.value.fault.code == code and caught.value.fault.way_out
    with pytest.raises(EngineError, match="exactly the base"):
        merged(tmp_path / "same", "darex", [base, base])
    wide = {**tuned, "layers.0.up.weight": tuned["layers.0.up.weight"] * 1e6}
    with pytest.raises(EngineError, match="too large for the format fp16"):
        merged(tmp_path / "fp16", "darex", [base, wide], values="fp16", drop=0.5)
    broken = {**tuned, "embed.weight": torch.full((30, 8), float("nan"))}
    with pytest.raises(EngineError, match=r"embed\.weight"):
        merged(tmp_path / "nan", "darex", [base, broken])
    source = {"source": f"folder:{tiny.folder / 'decoder'}"}
    recipe = {"operation": "transform", "task": "causal_lm", "model": source, "models": [source]}
    bad = {"slug": "darex", "params": {"rescale": "validation"}}
    (fault,) = check(parse_recipe({**recipe, "methods": [bad]})).faults
    assert fault.where == "methods[0].params.rescale" and fault.code == "no_data"
    bad = {"slug": "darex", "params": {"rescale": "fixed", "q": 0.05, "drop": 0.5}}
    (fault,) = check(parse_recipe({**recipe, "methods": [bad]})).faults
    assert fault.where == "methods[0].params.q"
    three = {**recipe, "models": [source, source], "methods": [{"slug": "darex"}]}
    assert [fault.code for fault in check(parse_recipe(three)).faults] == ["wrong_number"]


def test_a_fine_tuned_encoder_in_a_job(tiny: Tiny, tmp_path: Path) -> None:
    """The base has no classifier and other names than the fine-tuned model; the result is a whole classifier again."""
    from engine.ops.folder import run_folder
    from tests.engine.tiny import lay

    trained = lay(tmp_path / "trained", tiny.recipe([("full-finetuning", {})], task="classify", evaluations=1))
    assert run_folder(trained)["outcome"] == "succeeded"
    tuned = trained / "artifact" / "merged"
    for slug, params in (
        ("darex", {"drop": 0.5, "rescale": "outputs", "tries": 2, "masks": 1, "rows": 16, "row_length": 32}),
        ("task-arithmetic", {"scale": 1.0, "heads": "first"}),
    ):
        recipe = {
            **tiny.inputs("classify"), "operation": "transform", "models": [{"source": f"folder:{tuned}"}],
            "methods": [{"slug": slug, "params": params}], "settings": {"max_length": 48},
        }  # fmt: skip
        folder = lay(tmp_path / slug, parse_recipe(recipe))
        outcome = run_folder(folder)
        assert outcome["outcome"] == "succeeded", outcome
        before, after = (load_file(where / "model.safetensors") for where in (tuned, folder / "artifact" / "merged"))
        assert before.keys() == after.keys() and torch.equal(before["classifier.weight"], after["classifier.weight"])
        report = json.loads((folder / "artifact" / "artifact.json").read_text())["report"]
        if slug == "darex":
            assert report["control"]["fine_tuned"]["distance"] == 0 < report["control"]["result"]["distance"]
            assert any(not torch.equal(before[name], after[name]) for name in before)
        else:
            assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
