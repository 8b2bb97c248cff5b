"""Preferences: the task, DPO and SimPO against formulas written out by hand, and the reference that is taken once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from engine.core.control import Control, write_request
from engine.core.events import EventLog
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.ops.train import prepare
from engine.parts.preferences import dpo_losses
from engine.parts.sampling import sequence_logprobs
from engine.train.run import Run
from tests.engine.tiny import Tiny, lay, metric_rows

Methods = list[tuple[str, dict[str, Any]]]


def a_run(tiny: Tiny, folder: Path, methods: Methods, **settings: Any) -> Run:
    folder.mkdir(exist_ok=True)
    recipe = tiny.recipe(methods, task="preference", **settings)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    run.begin()
    return run


def by_hand(run: Run, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probabilities [2B] from whole logits, one row after the other, and the counts."""
    sums, counts = [], []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        scores = run.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        places = [t for t in range(1, len(ids)) if labels[t] != -100]
        sums.append(torch.stack([scores[t - 1, ids[t]] for t in places]).sum())
        counts.append(len(places))
    return torch.stack(sums), torch.tensor(counts)


def test_a_batch_holds_better_and_worse_answers_of_the_same_prompts(tiny: Tiny, tmp_path: Path) -> None:
    run = a_run(tiny, tmp_path, [("full-finetuning", {})])
    pair = run.encoded.train[0]
    batch = run.task.collate([pair], run.tokenizer, run.recipe)
    row = run.encoded.rows[pair.source]
    said = [
        run.tokenizer.decode(ids[labels != -100])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert row["chosen"] in said[0] and row["rejected"] in said[1]
    assert all(text.endswith(run.tokenizer.eos_token) for text in said), "an answer ends with its end mark"
    prompts = [
        run.tokenizer.decode(ids[: int((labels != -100).nonzero()[0])])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert prompts[0] == prompts[1] and row["prompt"] in prompts[0]


def test_fragments_continue_a_prefix_and_do_not_end(tiny: Tiny) -> None:
    from engine.tasks.preference import encoded_sides

    recipe = tiny.recipe([("full-finetuning", {})], task="preference")
    task_tokenizer = require(recipe).facts
    assert task_tokenizer is not None
    from engine.tasks import task

    tokenizer = task("preference").load_tokenizer(task_tokenizer.model)
    row = {"prompt": "Is it red?", "prefix": "Yes, the ", "open": "chosen", "chosen": "boat", "rejected": "tree."}
    better, worse = encoded_sides([row], tokenizer)
    assert not isinstance(better, Exception) and not isinstance(worse, Exception)
    ids, labels = better[0].tolist(), better[1].tolist()
    spoken = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(spoken).strip() == "boat" and tokenizer.eos_token_id not in spoken
    assert tokenizer.decode(ids).endswith("Yes, the boat")
    assert worse[1][-1] == tokenizer.eos_token_id


def test_sequence_scores_are_those_of_whole_logits(tiny: Tiny, tmp_path: Path) -> None:
    run = a_run(tiny, tmp_path, [("full-finetuning", {})])
    batch = run.next_batches()[0]
    sums, counts = run.task.sequence_scores(run.model, batch)  # type: ignore[attr-defined]
    expected, numbers = by_hand(run, batch)
    assert torch.allclose(sums.double(), expected, atol=1e-4) and torch.equal(counts, numbers)
    also, also_counts = sequence_logprobs(run.model, batch)
    assert torch.allclose(also, sums, atol=1e-4) and torch.equal(also_counts, counts)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_loss_and_gradient_equal_the_formula(tiny: Tiny, tmp_path: Path, beta: float) -> None:
    run = a_run(tiny, tmp_path, [("full-finetuning", {}), ("dpo", {"beta": beta})])
    batch = run.next_batches()[0]
    reference, _ = by_hand(run, batch)
    reference = reference.detach()
    with torch.no_grad():  # move away from the reference, or every margin is zero
        for place, parameter in enumerate(run.trainables):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)))
    loss = run.objective.loss(run.model, batch, run.rng)
    now, _ = by_hand(run, batch)
    better, worse = (now - reference).chunk(2)
    expected = -torch.log(1 / (1 + torch.exp(-beta * (better - worse)))).sum()
    assert loss.weight == len(better)
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-4)
    mine = torch.autograd.grad(loss.total, list(run.trainables), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(run.trainables), allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one.double(), other.double(), atol=1e-4)


def test_before_the_first_step_every_margin_is_zero(tiny: Tiny, tmp_path: Path) -> None:
    run = a_run(tiny, tmp_path, [("lora", {"r": 2}), ("dpo", {})])
    batch = run.next_batches()[0]
    loss = run.objective.loss(run.model, batch, run.rng)
    assert float(loss.total) / loss.weight == pytest.approx(math.log(2), abs=1e-4)


def test_simpo_at_equal_log_probabilities_is_minus_log_sigmoid_of_minus_gamma(tiny: Tiny, tmp_path: Path) -> None:
    run = a_run(tiny, tmp_path, [("full-finetuning", {}), ("simpo", {"beta": 2.5, "gamma": 0.5})])
    batch = run.next_batches()[0]
    half = len(batch["input_ids"]) // 2
    same = {**batch, **{key: torch.cat([batch[key][:half]] * 2) for key in ("input_ids", "attention_mask", "labels")}}
    loss = run.objective.loss(run.model, same, run.rng)
    assert float(loss.total) / half == pytest.approx(-math.log(1 / (1 + math.exp(0.5))), abs=1e-5)
    sums, counts = by_hand(run, batch)
    better, worse = (sums / counts).chunk(2)
    expected = -functional.logsigmoid(2.5 * (better - worse) - 0.5).sum()
    assert float(run.objective.loss(run.model, batch, run.rng).total) == pytest.approx(float(expected), rel=1e-4)


def test_the_kinds_of_loss_against_their_formulas() -> None:
    margin = torch.tensor([-2.0, 0.0, 0.3, 5.0])
    for m, got in zip(margin, dpo_losses(margin, beta=0.5, kind="hinge", label_smoothing=0.0), strict=True):
        assert float(got) == pytest.approx(max(0.0, 1 - 0.5 * float(m)))
    for m, got in zip(margin, dpo_losses(margin, beta=0.5, kind="ipo", label_smoothing=0.0), strict=True):
        assert float(got) == pytest.approx((float(m) - 1.0) ** 2)
    for m, got in zip(margin, dpo_losses(margin, beta=0.5, kind="sigmoid", label_smoothing=0.2), strict=True):
        p = 1 / (1 + math.exp(-0.5 * float(m)))
        assert float(got) == pytest.approx(-0.8 * math.log(p) - 0.2 * math.log(1 - p), rel=1e-5)


@pytest.mark.parametrize("slug", ["dpo", "simpo"])
def test_cutting_the_batch_changes_nothing(tiny: Tiny, tmp_path: Path, slug: str) -> None:
    rows = []
    for place, (batch, accumulate) in enumerate(((4, 1), (2, 2))):
        settings = {"batch_size": batch, "accumulate": accumulate, "max_steps": 1, "seed": 3}
        recipe = tiny.recipe([("full-finetuning", {}), (slug, {})], task="preference", **settings)
        folder = lay(tmp_path / f"{slug}{place}", recipe)
        assert run_folder(folder)["outcome"] == "succeeded"
        rows.append(metric_rows(folder)[0])
    assert rows[0]["weight"] == rows[1]["weight"] == 4


@pytest.mark.parametrize("slug", ["dpo", "simpo"])
def test_preferences_are_learned_with_other_slots_beside(tiny: Tiny, tmp_path: Path, slug: str) -> None:
    methods: Methods = [("lora", {"r": 4}), (slug, {}), ("cosine", {}), ("clip", {}), ("patience", {})]
    recipe = tiny.recipe(methods, task="preference", max_steps=30, epochs=20, evaluations=3, learning_rate=2e-2)
    folder = lay(tmp_path / slug, recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    about = json.loads((folder / "artifact" / "artifact.json").read_text())
    assert about["metrics"]["eval_loss"] < about["before"]["eval_loss"]
    rows = metric_rows(folder)
    assert {"reward_margin", "reward_accuracy", "logps_chosen"} <= rows[0].keys()
    assert rows[-1]["reward_margin"] > rows[0]["reward_margin"]


def test_the_reference_survives_a_pause(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe([("full-finetuning", {}), ("dpo", {})], task="preference", max_steps=4)
    whole, parted = lay(tmp_path / "whole", recipe), lay(tmp_path / "parted", recipe)
    run_folder(whole)
    write_request(parted, "pause")
    assert run_folder(parted)["outcome"] == "paused"
    (parted / "control.json").unlink()
    assert run_folder(parted)["outcome"] == "succeeded"
    assert metric_rows(whole) == metric_rows(parted)


def test_what_cannot_work_is_refused(tiny: Tiny) -> None:
    body = tiny.recipe([("full-finetuning", {})], task="preference").model_dump(mode="json")
    from engine.core.recipe import parse_recipe

    both = parse_recipe({**body, "methods": [{"slug": "full-finetuning"}, {"slug": "dpo"}, {"slug": "simpo"}]})
    assert [fault.code for fault in check(both).faults] == ["slot_taken"]
    plain = parse_recipe({**body, "methods": [{"slug": "full-finetuning"}, {"slug": "cross-entropy"}]})
    assert any("DPO" in fault.way_out for fault in check(plain).faults)
    doubt = parse_recipe(
        {
            **body,
            "methods": [
                {"slug": "full-finetuning"},
                {"slug": "dpo", "params": {"kind": "ipo", "label_smoothing": 0.1}},
            ],
        }
    )
    assert [fault.code for fault in check(doubt).faults] == ["excludes"]
    texts = parse_recipe(
        {
            **body,
            **tiny.inputs("causal_lm"),
            "task": "causal_lm",
            "methods": [{"slug": "full-finetuning"}, {"slug": "dpo"}],
        }
    )
    assert any(fault.code == "does_not_fit" for fault in check(texts).faults)
