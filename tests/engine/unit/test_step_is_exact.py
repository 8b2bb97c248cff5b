"""The quick paths of a training step against the plain ones and against transformers' Trainer: the same loss for fifty steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.bench.rivals import Pair, trainer_steps
from engine.bench.workbench import Workbench, random_llama
from engine.parts import losses
from engine.starters.corpus import stories
from engine.tasks.batching import is_packed, packed_batch, plain_batch
from engine.train.run import Run

STEPS, BATCH = 50, 4
RULES: list[tuple[str, dict[str, Any]]] = [
    ("constant", {"warmup": 0.0}),
    ("clip", {}),
    ("adamw", {"weight_decay": 0.0}),
]


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    made = Workbench()
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(bench: Workbench) -> Path:
    return random_llama(bench.folder, hidden=64, layers=2, ffn=128, heads=4, vocab=512)


def prepared(bench: Workbench, model: Path, **settings: Any) -> Run:
    rows = bench.folder / "rows.jsonl"
    told = stories(3, 80)
    rows.write_text(
        "".join(
            json.dumps({"instruction": text[:40], "output": text[40 : 60 + 7 * (n % 20)]}) + "\n"
            for n, text in enumerate(told)
        )
    )
    chosen = {
        "learning_rate": 1e-3,
        "epochs": 50,
        "batch_size": BATCH,
        "max_length": 128,
        "precision": "fp32",
        **settings,
    }
    return bench.run(
        bench.recipe(f"folder:{model}", f"file:{rows}", [("full-finetuning", {}), *RULES], task="instruct", **chosen)
    )


def groups(run: Run) -> list[list[Any]]:
    train = run.encoded.train
    return [[train[(turn * BATCH + n) % len(train)] for n in range(BATCH)] for turn in range(STEPS)]


def losses_of(run: Run, collate: Callable[[list[Any], int], dict[str, Tensor]]) -> list[float]:
    found = []
    for group in groups(run):
        report = run.update_rule.update(run, [collate(group, run.tokenizer.pad_token_id)])
        run.clock.step, run.clock.samples, run.clock.tokens = report.step, report.samples, report.tokens
        found.append(float(report.loss))
    return found


def farthest(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def plain(bench: Workbench, model: Path) -> list[float]:
    found = losses_of(prepared(bench, model), plain_batch)
    assert found[0] - found[-1] > 1.0, "it learns, so equal losses mean something"
    return found


def test_packing_changes_no_loss_of_fifty_steps(bench: Workbench, model: Path, plain: list[float]) -> None:
    run = prepared(bench, model)
    assert is_packed(packed_batch(groups(run)[0], 0))
    assert farthest(losses_of(run, packed_batch), plain) <= 1e-4


def test_logits_in_chunks_change_no_loss_of_fifty_steps(
    bench: Workbench, model: Path, plain: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 512 * 16)
    assert farthest(losses_of(prepared(bench, model), packed_batch), plain) <= 1e-4


def test_bf16_stays_within_its_rounding_for_fifty_steps(bench: Workbench, model: Path, plain: list[float]) -> None:
    """Half precision rounds at 2^-8; over fifty steps the losses part by less than two hundredths of the loss, less than two seeds do."""
    half = losses_of(prepared(bench, model, precision="bf16"), packed_batch)
    apart = [abs(a - b) / b for a, b in zip(half, plain, strict=True)]
    assert 0 < max(apart) < 0.02


def test_transformers_trainer_sees_the_same_losses_for_fifty_steps(bench: Workbench, model: Path) -> None:
    run = prepared(bench, model)
    rival = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    pairs: list[list[Pair]] = [[(list(e.input_ids), list(e.labels)) for e in group] for group in groups(run)]
    logged: list[float] = []
    trainer_steps(rival, pairs, run.tokenizer.pad_token_id, losses=logged, learning_rate=1e-3, schedule="constant")()
    assert farthest(losses_of(run, packed_batch), logged) <= 1e-4
