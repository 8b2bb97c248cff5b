"""DPO and SimPO on real judgements of real answers, with a real small Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.folder import run_folder
from tests.engine.tiny import lay

SEEDS = (1, 2)


def pairs(shared: Path, target: Path) -> Path:
    """Statements that match or do not match a described person (persona statements), as better and worse answers."""
    rows = []
    for name in ("interest-in-science", "agreeableness"):
        for line in (shared / "persona_statements_a" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((row["statement"], row["matching"]))
    yes = [text for text, matching in rows if matching.lower().startswith("yes")]
    no = [text for text, matching in rows if matching.lower().startswith("no")]
    with target.open("w", encoding="utf-8") as file:
        for better, worse in zip(yes, no, strict=False):
            file.write(json.dumps({"prompt": "Say what you think.", "chosen": better, "rejected": worse}) + "\n")
    return target


@pytest.mark.effects
def test_both_prefer_the_better_answer_more_often_than_before_and_than_learning_from_it_alone(
    shared_data: Path, tmp_path: Path, effect_row: Any
) -> None:
    source = pairs(shared_data, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text(
        "".join(json.dumps({**row, "prompt": f"Say what you think, number {n}."}) + "\n" for n, row in enumerate(rows))
    )
    found: dict[str, list[dict[str, float]]] = {"dpo": [], "simpo": []}
    before: list[float] = []
    for seed in SEEDS:
        for slug in found:
            body = {
                "task": "preference",
                "model": {"source": f"folder:{shared_data / 'stories260k'}"},
                "data": {"source": f"file:{source}"},
                "methods": [{"slug": "lora", "params": {"r": 8}}, {"slug": slug}, {"slug": "clip"}],
                "settings": {"max_steps": 80, "epochs": 20, "batch_size": 8, "max_length": 160, "learning_rate": 2e-3, "evaluations": 2,
                             "holdout": 0.2, "precision": "fp32", "seed": seed},
            }  # fmt: skip
            folder = lay(tmp_path / f"{slug}-{seed}", require(parse_recipe(body)).recipe)
            assert run_folder(folder)["outcome"] == "succeeded"
            about = json.loads((folder / "artifact" / "artifact.json").read_text())
            found[slug].append(about["metrics"])
            before.append(about["before"]["eval_accuracy"])
    for slug, scores in found.items():
        mine = [score["eval_accuracy"] for score in scores]
        effect_row(
            slug=slug, behaviour="Share of held-out pairs (persona statements) of which the better one is likelier per token, stories260k with LoRA, 80 steps.",
            baseline="the same model before training", ours=", ".join(f"{x:.3f} (seed {s})" for s, x in zip(SEEDS, mine, strict=True)),
            theirs=f"{sum(before) / len(before):.3f}", verdict="holds" if min(mine) > max(before) + 0.05 else "not seen at this size",
            note=f"Loss per token of the better answers after training {scores[0]['eval_chosen_loss']:.2f}.",
        )  # fmt: skip
        assert min(mine) > max(before)
