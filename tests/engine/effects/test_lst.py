"""What a ladder side network is worth: against a linear probe and LoRA, without its rungs, and from three starting points.

Grammar: real sentence pairs of BLiMP, one sentence of each pair, right or wrong, on MiniLM. A sentence encoder throws most of that away before its
last state, and its middle layers still know it. Shakespeare: the real 260K-parameter stories model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.bench.backward import saved_bytes
from engine.bench.workbench import Workbench, forward
from engine.train.loop import train
from engine.train.run import Run
from tests.engine.tiny import metric_rows

pytestmark = pytest.mark.effects
SEEDS = (1, 2)


@dataclass
class Outcome:
    """What a run ended with."""

    accuracy: float
    loss: float
    first: float  # mean training loss of the first 100 steps
    share: float  # of numbers that learn, against the base
    saved: int  # bytes that one batch keeps for backward


class Studies:
    """Runs on two tasks, each made once."""

    def __init__(self, data: Path) -> None:
        self.bench, self.data = Workbench(), data
        self.made: dict[str, Outcome] = {}
        pairs = [json.loads(line) for line in (data / "blimp_a" / "pairs.jsonl").read_text("utf-8").splitlines()]
        rows = [
            {"text": pair["sentence_good"], "label": "right"}
            if place % 2
            else {"text": pair["sentence_bad"], "label": "wrong"}
            for place, pair in enumerate(pairs)
        ]  # one sentence of each pair, so that no sentence has its twin on the other side
        random.Random(0).shuffle(rows)
        self.grammar_file = self.bench.folder / "grammar.jsonl"
        self.grammar_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        play = next((data / "tinyshakespeare").glob("*.txt")).read_text("utf-8")[:250_000]
        self.play_file = self.bench.folder / "play.txt"
        self.play_file.write_text(play, encoding="utf-8")

    def grammar(self, seed: int, slug: str, **params: Any) -> Outcome:
        """1,000 sentences learned in 8 passes, 1,000 others judged."""
        return self._made(
            "starter:minilm-l6", self.grammar_file, slug, params, seed,
            task="classify", epochs=8, batch_size=16, max_length=16, holdout=0.5,
        )  # fmt: skip

    def play(self, seed: int, slug: str, steps: int = 100, **params: Any) -> Outcome:
        """Steps of 8 x 128 tokens of Shakespeare."""
        return self._made(
            f"folder:{self.data / 'stories260k'}", self.play_file, slug, params, seed,
            task="causal_lm", epochs=30, max_steps=steps, batch_size=8, max_length=128, holdout=0.1,
        )  # fmt: skip

    def _made(self, model: str, data: Path, slug: str, params: dict[str, Any], seed: int, **settings: Any) -> Outcome:
        key = json.dumps([model, slug, params, seed, settings])
        if key not in self.made:
            self.made[key] = self._run(self.recipe(model, data, slug, params, seed, **settings))
        return self.made[key]

    def recipe(self, model: str, data: Path, slug: str, params: dict[str, Any], seed: int, **settings: Any) -> Any:
        methods = [(slug, params), ("clip", {})]
        return self.bench.recipe(model, f"file:{data}", methods, seed=seed, precision="fp32", evaluations=1, **settings)

    def _run(self, recipe: Any) -> Outcome:
        run = self.bench.run(recipe)
        saved = saved_bytes(lambda: forward(run, run.next_batches()[0]), run.model)
        run = self.bench.run(recipe)  # a fresh one: the look above moved the cursor
        train(run)
        losses = [row["loss"] for row in metric_rows(run.folder)]
        return Outcome(
            accuracy=float(run.scores.get("eval_accuracy", 0.0)),
            loss=float(run.scores["eval_loss"]),
            first=mean(losses[:100]),
            share=run.trainables.num_elements() / run.facts.model.num_parameters,
            saved=saved,
        )

    def probes(self, seed: int) -> dict[str, float]:
        """Logistic regression on the untouched model's last state: as the head reads it, and as the mean over the words."""
        from sklearn.linear_model import LogisticRegression

        run = self.bench.run(
            self.recipe(
                "starter:minilm-l6",
                self.grammar_file,
                "lora",
                {"r": 1},
                seed,
                task="classify",
                epochs=1,
                max_length=16,
                holdout=0.5,
            )
        )
        plain = run.task.load_model(run.facts.model, run.facts.data, dtype=torch.float32, seed=seed).eval()
        learned, judged = (_states(run, plain, examples) for examples in (run.encoded.train, run.encoded.holdout))
        scores = {}
        for name, features in learned.items():
            if name != "labels":
                fits = [
                    LogisticRegression(C=c, max_iter=2000).fit(features, learned["labels"]) for c in (0.1, 1.0, 10.0)
                ]
                scores[name] = max(fit.score(judged[name], judged["labels"]) for fit in fits)
        return scores


@torch.no_grad()
def _states(run: Run, plain: Any, examples: Any) -> dict[str, Any]:
    read, means, labels = [], [], []
    for start in range(0, len(examples), 50):
        batch = run.task.collate(examples[start : start + 50], run.tokenizer, run.recipe)
        out = plain.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        mask: Tensor = batch["attention_mask"][..., None].float()
        read.append(out.pooler_output)
        means.append(torch.nn.functional.normalize((out.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1))
        labels.append(batch["labels"])
    return {"head": torch.cat(read).numpy(), "mean": torch.cat(means).numpy(), "labels": torch.cat(labels).numpy()}


@pytest.fixture(scope="module")
def studies(shared_data: Path) -> Iterator[Studies]:
    made = Studies(shared_data)
    yield made
    made.bench.close()


def shown(values: list[float]) -> str:
    return f"{mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)}; seeds {', '.join(map(str, SEEDS))})"


def test_it_beats_a_linear_probe(studies: Studies, effect_row: Callable[..., None]) -> None:
    probes = [max(studies.probes(seed).values()) for seed in SEEDS]
    ours = [studies.grammar(seed, "lst").accuracy for seed in SEEDS]
    effect_row(
        slug="lst", behaviour="Right or wrong grammar, MiniLM, accuracy on 1,000 sentences: side network (k = 8) against a linear probe on the last state.",
        baseline="the better of two logistic regressions on the frozen last state (as the head reads it; mean over the words)",
        ours=shown(ours), theirs=shown(probes), verdict="holds" if min(ours) > max(probes) + 0.05 else "not seen at this size",
    )  # fmt: skip
    assert min(ours) > max(probes) + 0.05


def test_it_comes_near_lora_for_a_quarter_of_the_memory(studies: Studies, effect_row: Callable[..., None]) -> None:
    probes = [max(studies.probes(seed).values()) for seed in SEEDS]
    ours = [studies.grammar(seed, "lst").accuracy for seed in SEEDS]
    lora = [studies.grammar(seed, "lora", r=8, alpha=16).accuracy for seed in SEEDS]
    gain = (mean(ours) - mean(probes)) / (mean(lora) - mean(probes))
    one, other = studies.grammar(1, "lst"), studies.grammar(1, "lora", r=8, alpha=16)
    effect_row(
        slug="lst", behaviour="Right or wrong grammar, MiniLM, accuracy: at least 90 % of LoRA's gain over a linear probe.",
        baseline="LoRA r = 8, all linear layers", ours=shown(ours), theirs=shown(lora),
        verdict="holds" if gain >= 0.9 else "not seen at this size", paper="a little below LoRA on GLUE when memory is free (unconfirmed)",
        note=f"{gain:.0%} of LoRA's gain; {one.saved / other.saved:.2f} of the bytes kept for backward; {one.share:.2%} of the numbers learn "
        f"(LoRA {other.share:.2%}); 8 passes, rates as the studio suggests them; k = 4 on one seed: 0.827",
    )  # fmt: skip
    assert gain > 0.6 and one.saved < 0.5 * other.saved


def test_without_rungs_it_learns_less(studies: Studies, effect_row: Callable[..., None]) -> None:
    ours = [studies.grammar(seed, "lst").accuracy for seed in SEEDS]
    bare = [studies.grammar(seed, "lst", ladders="last").accuracy for seed in SEEDS]
    effect_row(
        slug="lst", behaviour="Right or wrong grammar, MiniLM, accuracy: every layer has a rung, against the last state alone.",
        baseline="the same side network, fed by h_N alone", ours=shown(ours), theirs=shown(bare),
        verdict="holds" if min(ours) > max(bare) + 0.02 else "not seen at this size",
    )  # fmt: skip
    assert min(ours) > max(bare) + 0.02


def test_a_start_cut_by_fisher_learns_faster_than_a_random_one(
    studies: Studies, effect_row: Callable[..., None]
) -> None:
    starts = {init: [studies.play(seed, "lst", init=init) for seed in SEEDS] for init in ("fisher", "weight", "random")}
    first = {init: [one.first for one in runs] for init, runs in starts.items()}
    loss = {init: [one.loss for one in runs] for init, runs in starts.items()}
    holds = max(loss["fisher"]) < min(loss["random"])
    effect_row(
        slug="lst", behaviour="Shakespeare, stories model, held-out loss after 100 steps: Fisher start against random start.",
        baseline="side blocks drawn at random", ours=shown(loss["fisher"]), theirs=shown(loss["random"]),
        verdict="holds" if holds else "not seen at this size",
        note=f"by size of the weights {shown(loss['weight'])}; mean training loss of the 100 steps {mean(first['fisher']):.3f} (Fisher), "
        f"{mean(first['weight']):.3f} (weights), {mean(first['random']):.3f} (random)",
    )  # fmt: skip
    assert mean(loss["fisher"]) < mean(loss["random"]) and mean(first["fisher"]) < mean(first["random"])


def test_beside_a_tiny_decoder_it_is_a_poor_rival_of_lora(studies: Studies, effect_row: Callable[..., None]) -> None:
    ours = [studies.play(seed, "lst").loss for seed in SEEDS]
    lora = [studies.play(seed, "lora", r=8, alpha=16).loss for seed in SEEDS]
    effect_row(
        slug="lst", behaviour="Shakespeare, stories model of width 64, held-out loss after 100 steps: side network of width 16 against LoRA.",
        baseline="LoRA r = 8, all linear layers", ours=shown(ours), theirs=shown(lora), verdict="not seen at this size",
        note="frozen 4.87; a side network of width 16 with heads of two numbers is too small to speak a new style",
    )  # fmt: skip
    assert mean(lora) < mean(ours) < 4.5
