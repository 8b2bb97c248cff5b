"""The ordinary step, its objective and its gradient rule, on real runs of a tiny decoder and encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.core.control import Control
from engine.core.events import EventLog
from engine.methods.clip import ClipNorm
from engine.ops.check import require
from engine.ops.train import prepare
from engine.parts.losses import cross_entropy_sum
from engine.tasks import task as task_named
from engine.train.parts import GradientRule, Loss, LossTerm, StepReport
from engine.train.run import Run
from engine.train.trainables import Trainables
from tests.engine.tiny import Tiny, lay


class Copies(GradientRule):
    """Keeps the gradients it is shown."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def apply(self, trainables: Trainables, norm: Tensor) -> dict[str, Any]:
        self.seen = {name: p.grad.clone() for name, p in trainables.items() if p.grad is not None}
        return {}


def run_of(
    tiny: Tiny, folder: Path, methods: list[tuple[str, dict[str, Any]]], *, task: str = "causal_lm", **settings: Any
) -> Run:
    recipe = tiny.recipe(methods, task=task, **{"max_length": 128, **settings})
    lay(folder, recipe)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    run.model.eval()  # no dropout: steps are compared number by number
    return run


def examples(run: Run, indices: list[int]) -> dict[str, Tensor]:
    return run.task.collate([run.encoded.train[i] for i in indices], run.tokenizer, run.recipe)


def update(run: Run, groups: list[list[int]], *rules: GradientRule) -> tuple[StepReport, dict[str, Tensor]]:
    copies = Copies()
    run.rules = [*rules, copies]
    return run.update_rule.update(run, [examples(run, group) for group in groups]), copies.seen


PARAMETRIZATIONS = ["full-finetuning", "lora", "paca"]


@pytest.mark.parametrize("task", ["causal_lm", "classify", "instruct"])
@pytest.mark.parametrize("slug", PARAMETRIZATIONS)
def test_any_cut_into_micro_batches_is_the_same_step(tiny: Tiny, tmp_path: Path, slug: str, task: str) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [(slug, {} if slug == "full-finetuning" else {"r": 4})]
    whole, parts = (run_of(tiny, tmp_path / name, methods, task=task) for name in ("whole", "parts"))
    one, dense = update(whole, [list(range(8))])
    many, summed = update(parts, [[0, 1, 2, 3, 4], [5], [6, 7]])
    torch.testing.assert_close(many.loss, one.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(many.grad_norm, one.grad_norm, rtol=1e-5, atol=0)
    assert dense.keys() == summed.keys() == dict(whole.trainables.items()).keys()
    for name, gradient in dense.items():
        torch.testing.assert_close(
            summed[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max() + 1e-3), msg=name
        )
    assert (one.weight, one.samples, one.tokens) == (many.weight, many.samples, many.tokens)
    assert one.samples == 8 and one.step == 1 and one.epoch == pytest.approx(1 / whole.clock.steps_per_epoch)


def test_loss_and_norm_equal_an_independent_computation(tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(tiny, tmp_path, [("full-finetuning", {})], packing=False)
    rows = [run.encoded.train[i] for i in range(5)]
    total, count = torch.zeros(()), 0
    for row in rows:  # one by one, through the loss of transformers itself
        ids = torch.tensor([row.input_ids])
        total = total + run.model(input_ids=ids, labels=torch.tensor([row.labels])).loss * (len(row) - 1)
        count += len(row) - 1
    (total / count).backward()
    squares = sum(float((p.grad.double() ** 2).sum()) for p in run.trainables if p.grad is not None)
    expected_loss, expected_norm = total.item() / count, math.sqrt(squares)
    run.optimizer.zero_grad()
    report, _ = update(run, [[0, 1, 2, 3, 4]])
    assert report.loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert report.grad_norm.item() == pytest.approx(expected_norm, rel=1e-5)
    assert report.weight == count and all(p.grad is None for p in run.trainables)


def test_clipping_scales_the_gradients_and_leaves_the_logged_norm(tiny: Tiny, tmp_path: Path) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {})]
    free, loose, tight = (run_of(tiny, tmp_path / name, methods) for name in ("free", "loose", "tight"))
    plain, before = update(free, [[0, 1, 2, 3]])
    norm = plain.grad_norm.item()
    calm, same = update(loose, [[0, 1, 2, 3]], ClipNorm(norm * 2))
    hard, clipped = update(tight, [[0, 1, 2, 3]], ClipNorm(norm / 4))
    assert calm.grad_norm.item() == hard.grad_norm.item() == norm
    assert (float(calm.extra["clipped"]), float(hard.extra["clipped"])) == (0.0, 1.0)
    assert isinstance(hard.extra["clipped"], Tensor)  # read by the loop, once
    assert all(torch.equal(same[name], before[name]) for name in before)
    after = math.sqrt(sum(float((g.double() ** 2).sum()) for g in clipped.values()))
    assert after == pytest.approx(norm / 4, rel=1e-4)
    for name in before:
        torch.testing.assert_close(clipped[name] * 4, before[name], rtol=1e-4, atol=1e-8)


def test_terms_count_once_a_step_however_the_batch_is_cut(tiny: Tiny, tmp_path: Path) -> None:
    class Shrink(LossTerm):
        def term(self, model: nn.Module, batch: Mapping[str, Tensor], loss: Loss, share: float) -> Tensor:
            return share * 0.5 * sum((p.square().sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))

    methods: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {})]
    plain, with_term = (run_of(tiny, tmp_path / name, methods) for name in ("plain", "term"))
    values = {name: tensor.clone() for name, tensor in plain.trainables.tensors().items()}
    with_term.terms = [Shrink()]
    one, without = update(plain, [[0, 1, 2], [3, 4, 5, 6]])
    other, added = update(with_term, [[0, 1, 2], [3, 4, 5, 6]])
    assert one.loss.item() == other.loss.item()  # the objective alone
    for name in values:
        torch.testing.assert_close(added[name], without[name] + values[name], rtol=1e-4, atol=1e-5)


def test_the_schedule_sets_the_rate_of_this_step(tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(
        tiny, tmp_path, [("full-finetuning", {}), ("linear", {"warmup": 0.5})], max_steps=8, learning_rate=0.01
    )
    rates = []
    for _ in range(8):
        report, _ = update(run, [[0, 1]])
        assert all(group["lr"] == report.learning_rate for group in run.optimizer.param_groups)
        run.clock.step = report.step
        rates.append(report.learning_rate)
    assert rates == pytest.approx([0.01 * f for f in (0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25)])
    assert run.warmup_steps == 4


@pytest.mark.parametrize("task", ["causal_lm", "classify", "instruct"])
def test_the_weight_known_before_the_forward_pass_is_the_true_one(tiny: Tiny, tmp_path: Path, task: str) -> None:
    run = run_of(tiny, tmp_path, [("full-finetuning", {})], task=task)
    for group in ([0], [0, 1, 2, 3], list(range(8))):
        batch = examples(run, group)
        loss = run.objective.loss(run.model, batch, run.rng)
        assert run.objective.weight(batch) == loss.weight > 0
    assert task_named(task).name == task


def test_cross_entropy_is_a_sum_in_fp32_with_or_without_doubt() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    right = -logs[torch.arange(7), labels].sum()
    assert cross_entropy_sum(logits.float(), labels).item() == pytest.approx(right.item(), rel=1e-6)
    doubting = 0.8 * right - 0.2 * logs.mean(-1).sum()
    assert cross_entropy_sum(logits.float(), labels, 0.2).item() == pytest.approx(doubting.item(), rel=1e-6)
    half = cross_entropy_sum(logits.bfloat16(), labels)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(right.item(), rel=2e-2)


def test_bf16_runs_forward_in_bf16_and_learns_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    for slug, params in (("paca", {"r": 4}), ("lora", {"r": 4}), ("full-finetuning", {})):
        run = run_of(tiny, tmp_path / slug, [(slug, params)], precision="bf16")
        exact = run_of(tiny, tmp_path / f"{slug}-exact", [(slug, params)])
        (report, gradients), (precise, _) = update(run, [[0, 1, 2, 3]]), update(exact, [[0, 1, 2, 3]])
        assert (
            report.loss.item() == pytest.approx(precise.loss.item(), rel=2e-2)
            and report.loss.item() != precise.loss.item()
        )
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        assert {tensor.dtype for tensor in run.trainables.tensors().values()} == {torch.float32}
