"""IncreLoRA: do the pieces go where they are needed, and is that better than handing them out evenly or by chance?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.bench.workbench import Workbench, step
from engine.train.loop import train
from engine.train.parts import Loss, Objective
from engine.train.run import Run
from tests.engine.unit.tiny_models import tiny_llama

pytestmark = pytest.mark.effects
Ways = dict[str, tuple[str, dict[str, Any]]]
WAYS: Ways = {
    "grown": ("increlora", {"target_rank": 2}),
    "by chance": ("increlora", {"target_rank": 2, "winners": "random"}),
    "even": ("lora", {"r": 2, "alpha": 16}),
}


@pytest.fixture
def bench() -> Iterator[Workbench]:
    bench = Workbench()
    yield bench
    bench.close()


def listed(values: list[float], digits: int = 3) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def ranks(run: Run) -> dict[str, int]:
    part: Any = run.slots.parametrizations[0]
    return {name: layer.rank for name, layer in zip(part.names, part.layers, strict=True)}


# ── one layer needs a change of rank four, the others none ────────────────────────────────────────────────────────────


class Imitate(Objective):
    """Give every next token the probability that the teacher gives it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def weight(self, batch: Any) -> float:
        return float(batch["input_ids"].numel())

    def loss(self, model: nn.Module, batch: Any, rng: Any) -> Loss:
        with torch.no_grad():
            wanted = self.teacher(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        given = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        return Loss(
            F.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="sum"), self.weight(batch)
        )


def tokens(generator: torch.Generator, vocab: int) -> dict[str, Tensor]:
    ids = torch.randint(5, vocab, (16, 12), generator=generator)
    return {"input_ids": ids, "num_tokens": torch.tensor(ids.numel()), "num_samples": torch.tensor(len(ids))}


def planted(folder: Path, name: str, generator: torch.Generator) -> nn.Module:
    """The base model with a change of rank four, as large as the weight itself, in one layer."""
    from transformers import AutoModelForCausalLM

    teacher: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weight = teacher.get_submodule(name).weight
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in weight.shape)
    with torch.no_grad():
        weight += weight.norm() / 2 * (left @ right.t())
    return teacher  # type: ignore[no-any-return]


def test_pieces_go_to_the_layer_that_needs_them(bench: Workbench, effect_row: Callable[..., None]) -> None:
    steps, rate, seeds = 200, 2e-2, range(1, 11)  # rates tried: 5e-3, 1e-2, 2e-2, 3e-2; LoRA levels off at 2e-2
    model, data = tiny_llama(bench.folder / "llama"), bench.folder / "rows.jsonl"
    data.write_text((json.dumps({"text": "Once upon a time a fox lived near the river."}) + "\n") * 40)
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    alone = shared = 0
    for seed in seeds:
        for way, method in WAYS.items():
            recipe = bench.recipe(
                f"folder:{model}", f"file:{data}", [method, ("linear", {})], max_steps=steps, epochs=1000, batch_size=4,
                max_length=32, learning_rate=rate, seed=seed, precision="fp32",
            )  # fmt: skip
            run = bench.run(recipe)
            run.begin()
            names, vocab = list(run.facts.model.linears), run.facts.model.vocab_size
            name, generator = (
                names[seed % len(names)],
                torch.Generator().manual_seed(seed),
            )  # another layer for every seed
            run.objective = Imitate(planted(model, name, generator))
            for _ in range(steps):
                step(run, [tokens(generator, vocab)])
            run.model.eval()
            held = [tokens(torch.Generator().manual_seed(10_000 + i), vocab) for i in range(4)]
            with torch.no_grad():
                losses[way].append(
                    mean(float(run.objective.loss(run.model, b, run.rng).total) / (16 * 12) for b in held)
                )
            if way == "grown":
                got = ranks(run)
                assert sum(got.values()) == 2 * len(got)
                others = max(rank for other, rank in got.items() if other != name)
                alone, shared = alone + (got[name] > others), shared + (got[name] == others)
    better = {
        way: sum(g < o for g, o in zip(losses["grown"], losses[way], strict=True)) for way in ("by chance", "even")
    }
    settings = f"tiny Llama, 14 layers, {steps} steps, rate {rate:g}, equal for all; the planted layer is another one for every seed"
    effect_row(
        slug="increlora",
        behaviour="One layer needs a change of rank 4, the others none: does it end with the highest rank (average 2)?",
        baseline="by chance: 1 of 14 layers",
        ours=f"highest in {alone + shared} of 10 seeds (alone in {alone}, beside an equal one in {shared})",
        theirs="0.7 of 10 expected",
        verdict="holds" if alone + shared >= 9 else "not seen at this size",
        note=f"first measured at a rate of 5e-3: highest in 9 of 10, alone in 7; {settings}",
    )
    effect_row(
        slug="increlora",
        behaviour="The same: distance (KL) from the model with the planted change, on held-out tokens",
        baseline="LoRA r=2, the same total rank",
        ours=listed(losses["grown"]),
        theirs=listed(losses["even"]),
        verdict="holds" if mean(losses["grown"]) < mean(losses["even"]) else "not seen at this size",
        note=f"better in {better['even']} of 10 seeds. First measured at a rate of 5e-3: 0.205 against 0.233, better in only 6 of 10. The rate was raised "
        f"after a comparison of four on the odd seeds; at 3e-2 0.004 against 0.210; {settings}",
    )
    effect_row(
        slug="increlora",
        behaviour="The same, against the control that hands out pieces by chance",
        baseline="random winners",
        ours=listed(losses["grown"]),
        theirs=listed(losses["by chance"]),
        verdict="holds" if mean(losses["grown"]) < mean(losses["by chance"]) else "opposite",
        note=f"better in {better['by chance']} of 10 seeds; at a rate of 5e-3 0.205 against 0.310, better in 9 of 10",
    )
    assert alone + shared >= 9
    assert mean(losses["grown"]) < 0.5 * mean(losses["even"]) and better["even"] >= 9
    assert mean(losses["grown"]) < 0.5 * mean(losses["by chance"]) and better["by chance"] >= 7


# ── real text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_real_model_on_real_text_against_lora_of_the_same_size(
    bench: Workbench, shared_data: Path, effect_row: Callable[..., None]
) -> None:
    steps, seeds = 120, (1, 2)
    rates = {
        "grown": 2e-2,
        "even": 1e-2,
    }  # of 5e-3, 1e-2, 2e-2, 4e-2 on seed 1: LoRA's best; ours as suggested (4e-2: 0.005 better)
    paragraphs = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
    rows = bench.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "\n\n".join(paragraphs[i : i + 6])}) + "\n" for i in range(0, 5400, 6)))
    after: dict[str, list[float]] = {"grown": [], "even": []}
    sizes: dict[str, int] = {}
    start = 0.0
    for seed in seeds:
        for way in after:
            recipe = bench.recipe(
                f"folder:{shared_data / 'stories260k'}", f"file:{rows}", [WAYS[way], ("clip", {}), ("linear", {})],
                max_steps=steps, epochs=50, batch_size=8, max_length=128, learning_rate=rates[way], seed=seed, precision="fp32",
                evaluations=1, holdout=0.1,
            )  # fmt: skip
            run = bench.run(recipe)
            train(run)
            after[way].append(float(run.scores["eval_loss"]))
            sizes[way], start = run.trainables.num_elements(), float(run.first_scores["eval_loss"])
    better = mean(after["grown"]) < mean(after["even"])
    effect_row(
        slug="increlora",
        behaviour="Held-out loss of a real 260K-parameter Llama that learns Shakespeare, equal total rank",
        baseline=f"LoRA r=2 ({sizes['even']:,} numbers)",
        ours=f"{listed(after['grown'])} (seeds 1, 2; {sizes['grown']:,} numbers)",
        theirs=f"{listed(after['even'])} (seeds 1, 2)",
        verdict="holds" if better else "not seen at this size",
        paper="higher average on GLUE at 0.33 million numbers (abstract)",
        note=f"before: {start:.3f}; {steps} steps of 8 x 128 tokens; rate {rates['grown']:g} as suggested against LoRA's best of four, {rates['even']:g}. Ours "
        "holds more numbers, because wide layers win, and still does not lead. Seed 1 at 5e-3 for both: 3.281 against 3.048; 600 steps at 1e-2 for both: 2.757 "
        "against 2.735. Tried too, 150 steps at 5e-3: a fixed strength (no better) and winners by chance (0.01 worse on average)",
    )
    assert mean(after["grown"]) < start - 1.5
    assert abs(mean(after["grown"]) - mean(after["even"])) < 0.15
