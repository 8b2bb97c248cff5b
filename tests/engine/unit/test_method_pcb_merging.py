"""Parameter competition against the card's formulas written out over whole vectors, and the planted-vectors behaviour."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.methods.pcb_merging import PCBMerging
from engine.ops.transform import ModelFolder, OutFolder, TransformContext
from engine.parts.competition import balance
from engine.parts.judge import evolve
from engine.tasks import task
from tests.engine.folders import flat, merged, random_family, write_model
from tests.engine.tiny import Tiny


def minmax(values: Tensor) -> Tensor:
    low, high = values.min(-1, keepdim=True).values, values.max(-1, keepdim=True).values
    return (values - low) / (high - low)


def brute_force(taus: Tensor, *, keep: float, clamp: float, variant: str, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The card's steps 2 to 5 over whole vectors in fp64: merged task vector [d] and weights [n, d]."""
    taus = taus.double()
    num, size = taus.shape
    order = taus.abs().sort(1).values
    low = order[:, int(clamp * (size - 1))].unsqueeze(1)
    high = order[:, size - 1 - int(clamp * (size - 1))].unsqueeze(1)
    a = taus.abs().clamp(low, high)
    c = taus.sign() * a
    if variant == "code":
        score = torch.exp(num * minmax(a) ** 2) * torch.tanh(taus * taus.sum(0))
    else:
        intra = torch.softmax(num * minmax(c * c), dim=1)
        inter = sum(torch.softmax(minmax(c * other), dim=1) for other in c)
        score = intra * inter
    cut = score.sort(1).values[:, max(1, size - round(keep * size)) - 1].unsqueeze(1)
    w = minmax(score.clamp(min=cut))
    return (scales.unsqueeze(1) * c * w).sum(0) / w.sum(0).clamp(min=1e-12), w


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(("keep", "clamp"), [(0.1, 0.01), (0.3, 0.0), (1.0, 0.05)])
def test_the_merged_vector_is_that_of_the_formulas(tmp_path: Path, variant: str, keep: float, clamp: float) -> None:
    models = random_family(3, seed=1)
    result, report = merged(
        tmp_path, "pcb-merging", models, variant=variant, keep=keep, clamp=clamp, scales="1.2, 0.8, 1"
    )
    base = flat(models[0], models[0])
    taus = torch.stack([(flat(model, models[0]) - base).float() for model in models[1:]])
    expected, w = brute_force(
        taus, keep=keep, clamp=clamp, variant=variant, scales=torch.tensor([1.2, 0.8, 1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(flat(result, models[0]), base + expected, rtol=0, atol=2e-6)
    size = taus.shape[1]
    wanted = min(round(keep * size), size - 1)
    assert [round(share * size) for share in report["kept"].values()] == [wanted] * 3 == (w > 0).sum(1).tolist()
    assert sum(report["kept_by"].values()) == pytest.approx(1.0, abs=1e-5)
    assert report["kept_by"]["0"] == pytest.approx(float((w == 0).all(0).float().mean()), abs=1e-5)


def test_within_each_tensor_is_the_same_formula_tensor_by_tensor(tmp_path: Path) -> None:
    models = random_family(3, seed=2)
    result, _ = merged(tmp_path, "pcb-merging", models, keep=0.25, scope="tensor", scale=1.1)
    for name, start in models[0].items():
        if not start.is_floating_point():
            assert torch.equal(result[name], start)
            continue
        taus = torch.stack([(model[name] - start).flatten() for model in models[1:]])
        expected, _ = brute_force(
            taus, keep=0.25, clamp=0.01, variant="code", scales=torch.full((3,), 1.1, dtype=torch.float64)
        )
        torch.testing.assert_close(
            result[name].flatten().double(), start.flatten() + expected, rtol=0, atol=2e-6, msg=name
        )


def test_one_model_kept_whole_is_base_plus_scaled_change(tmp_path: Path) -> None:
    base, tuned = random_family(1, seed=3)
    result, _ = merged(tmp_path, "pcb-merging", [base, tuned], keep=1.0, clamp=0.0, scale=0.6)
    start, change = flat(base, base), flat(tuned, base) - flat(base, base)
    wrong = (flat(result, base) - (start + 0.6 * change)).abs() > 2e-6
    assert int(wrong.sum()) <= 1 and (not wrong.any() or int(change.abs().argmin()) == int(wrong.nonzero()[0]))


def test_equal_changes_give_the_scaled_change_on_kept_places(tmp_path: Path) -> None:
    base, tuned = random_family(1, seed=4)
    result, report = merged(tmp_path, "pcb-merging", [base, tuned, tuned, tuned], keep=0.2, clamp=0.0, scale=1.3)
    start, change = flat(base, base), flat(tuned, base) - flat(base, base)
    moved = flat(result, base) - start
    kept = moved != 0
    torch.testing.assert_close(moved[kept], 1.3 * change[kept], rtol=0, atol=3e-6)
    assert report["kept_by"]["3"] == pytest.approx(0.2, abs=1e-3) and report["kept_by"]["1"] == 0
    assert float(change[kept].abs().min()) >= float(change[~kept].abs().max())  # among equals the largest survive


@pytest.mark.parametrize("factor", [1e-6, 1e-3])
def test_tiny_changes_do_not_vanish(factor: float) -> None:
    taus = torch.randn(3, 4000, generator=torch.Generator().manual_seed(5)) * factor
    found = balance(lambda: taus.split(1000, dim=1), 4000, variant="code", keep=0.1, clamp=0.01)
    expected, w = brute_force(taus, keep=0.1, clamp=0.01, variant="code", scales=torch.ones(3, dtype=torch.float64))
    assert ((found.weights(taus) > 0) == (w > 0)).float().mean() > 0.9995
    torch.testing.assert_close(found.fuse(taus, torch.ones(3)).double(), expected, rtol=1e-3, atol=0.02 * factor)


def test_many_models_do_not_overflow() -> None:
    taus = torch.randn(120, 500, generator=torch.Generator().manual_seed(6))
    found = balance(lambda: [taus], 500, variant="code", keep=0.1, clamp=0.0)
    assert torch.isfinite(found.weights(taus)).all() and (found.weights(taus).max(1).values == 1).all()


def test_planted_vectors_are_found_and_noise_is_not() -> None:
    """Behaviour 1 of the card: every task truly moves its own 5 % of 20,000 entries, with noise of 0.05 elsewhere."""
    generator = torch.Generator().manual_seed(7)
    size, num = 20_000, 4
    taus = 0.05 * torch.randn(num, size, generator=generator)
    truth = torch.zeros(num, size)
    places = torch.randperm(size, generator=generator)[: num * size // 20].view(num, -1)
    for task_number, own in enumerate(places):
        truth[task_number, own] = torch.randn(len(own), generator=generator).sign() * (
            1 + torch.rand(len(own), generator=generator)
        )
        taus[task_number, own] = truth[task_number, own]
    wanted = truth.sum(0)
    on = wanted != 0

    def error(result: Tensor) -> float:
        return float((result[on] - wanted[on]).square().sum() / wanted[on].square().sum())

    def noise(result: Tensor) -> float:
        return float(result[~on].square().sum() / (0.05**2 * (~on).sum())) ** 0.5

    def pcb(keep: float, variant: Any = "code") -> Tensor:
        found = balance(lambda: taus.split(7000, dim=1), size, variant=variant, keep=keep, clamp=0.01)
        return found.fuse(taus, torch.ones(num))

    assert error(taus.mean(0)) == pytest.approx(0.56, abs=0.02) and noise(taus.sum(0)) == pytest.approx(2.0, abs=0.05)
    assert error(taus.sum(0)) == pytest.approx(0.003, abs=0.002)
    for keep in (0.05, 0.1, 0.2):
        assert error(pcb(keep)) < 0.0018
    assert noise(pcb(0.05)) < 0.02 and noise(pcb(0.1)) < 0.4 and noise(pcb(0.2)) < 1.1
    assert noise(pcb(0.05)) < noise(pcb(0.1)) < noise(pcb(0.2)) < noise(taus.sum(0))


# ── the search ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_strategy_finds_a_minimum_inside_the_bounds() -> None:
    def score(point: list[float]) -> float:
        return (point[0] - 1.2) ** 2 + (point[1] - 0.9) ** 2

    best, least, path = evolve(score, [1.0, 1.0], low=0.8, high=1.3, budget=100, seed=1)
    assert best == pytest.approx([1.2, 0.9], abs=0.03) and least == path[-1] and len(path) == 100
    assert path == sorted(path, reverse=True)
    assert evolve(score, [1.0, 1.0], low=0.8, high=1.3, budget=100, seed=1)[0] == best
    outside, _, _ = evolve(score, [9.0, -9.0], low=0.8, high=1.1, budget=40, seed=2)
    assert all(0.8 <= value <= 1.1 for value in outside)


def test_the_search_scores_merged_weights_and_never_gets_worse(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = load_file(tiny.folder / "decoder" / "model.safetensors")
    generator = torch.Generator().manual_seed(8)
    models = [base] + [
        {n: w + 0.02 * torch.randn(w.shape, generator=generator) for n, w in base.items()} for _ in range(2)
    ]
    folders = [write_model(tmp_path / f"m{place}", model) for place, model in enumerate(models)]
    ids = AutoTokenizer.from_pretrained(tiny.folder / "decoder")(
        "Once upon a time there was a fox.", return_tensors="pt"
    ).input_ids
    batch = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
    }

    class Context(TransformContext):
        task = task("causal_lm")

        def __init__(self) -> None:
            super().__init__()
            self.recipe = SimpleNamespace(data=object())

        def calibration(self, num: int, length: int | None = None) -> list[dict[str, Tensor]]:
            return [batch]

        def load_model(self, index: int = 0) -> nn.Module:
            return AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32)

    def apply(out: str, **params: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        ctx = Context()
        (tmp_path / out).mkdir()
        inputs = [ModelFolder(folder, f"sources[{place}]") for place, folder in enumerate(folders)]
        PCBMerging(PCBMerging.Params(keep=0.3, **params)).apply(inputs, OutFolder(tmp_path / out), ctx)
        return load_file(tmp_path / out / "model.safetensors"), ctx.report

    found, report = apply("found", search=True, budget=8, search_low=-1.0, search_high=1.0)
    again, _ = apply("again", scales=", ".join(f"{value:.6f}" for value in report["scales"].values()))
    assert all(torch.allclose(found[name], again[name], atol=1e-5) for name in found)
    assert report["search"]["loss_at_end"] < report["search"]["loss_at_start"] and report["search"]["tries"] == 8
    model = Context().load_model()
    model.load_state_dict(found, strict=False)
    model.tie_weights()
    loss = model(**{k: v for k, v in batch.items() if k != "position_ids"}).loss
    assert float(loss.detach()) == pytest.approx(report["search"]["loss_at_end"], abs=1e-4)
