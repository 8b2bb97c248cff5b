"""iTool on a small Llama that makes a systematic mistake in its calls: searching and preferring against more of the same examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.ops.pretrain import train_tokenizer
from tests.engine.tiny import lay

SEEDS, STEPS = (1, 2), 900
THINGS, PLACES = ("lamp", "door", "bell", "boat", "oven", "fan"), ("hall", "yard", "attic", "shed")


def call(thing: str, place: str, level: int, wrong: bool) -> dict[str, Any]:
    """A request and its call; the mistake names another place."""
    said = PLACES[(PLACES.index(place) + 1) % len(PLACES)] if wrong else place
    return {
        "messages": [
            {"role": "user", "content": f"Set the {thing} in the {place} to {level}."},
            {"role": "assistant", "content": f"set(what='{thing}', where='{said}', level={level})"},
        ]
    }


def every(wrong_things: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [call(t, p, n, t in wrong_things) for t in THINGS for p in PLACES for n in range(1, 10)]


def small_llama(folder: Path, seed: int) -> Path:
    """Random weights, and a tokenizer for which every word of the requests is a token or two."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([turn["content"] for row in every() for turn in row["messages"]], 420)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    job = lay(folder, require(parse_recipe(body)).recipe)
    result = run_folder(job)
    assert result["outcome"] == "succeeded", result["message"]
    about: dict[str, Any] = json.loads((job / "artifact" / "artifact.json").read_text())
    return about


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"file:{path}"


def settings(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "batch_size": 16,
        "max_length": 96,
        "holdout": 0.05,
        "evaluations": 1,
        "precision": "fp32",
        "seed": seed,
        "epochs": 50,
        **more,
    }


@pytest.mark.effects
def test_one_round_repairs_a_systematic_error_better_than_more_of_the_same(tmp_path: Path, effect_row: Any) -> None:
    table: dict[str, list[dict[str, float]]] = {"before": [], "search": [], "random pairs": [], "more examples": []}
    for seed in SEEDS:
        home = tmp_path / str(seed)
        home.mkdir()
        blank = small_llama(home / "blank", seed)
        first = run(home / "sft", {
            "task": "instruct", "model": {"source": f"folder:{blank}"}, "data": {"source": write(home / "wrong.jsonl", every(("lamp", "door")))},
            "methods": [{"slug": "full-finetuning"}, {"slug": "clip"}], "settings": settings(seed, max_steps=STEPS, learning_rate=3e-3, epochs=500),
        })  # fmt: skip
        assert first["steps"] == STEPS
        model = {"source": f"folder:{home / 'sft' / 'artifact' / 'merged'}"}
        data = {"source": write(home / "right.jsonl", every())}
        flow = {
            "iterations": 1,
            "warm_up": False,
            "select": 0.3,
            "temperature": 1.0,
            "max_tokens": 60,
            "rate": 1e-3,
            "epochs": 3,
            "r": 8,
        }
        for name, pairs in (("search", "search"), ("random pairs", "random")):
            about = run(home / pairs, {
                "operation": "flow", "task": "instruct", "model": model, "data": data,
                "methods": [{"slug": "irft-tool-use", "params": {**flow, "pairs": pairs}}], "settings": settings(seed),
            })  # fmt: skip
            rows = about["report"]["table"]
            table[name].append(rows[-1])
            if pairs == "search":
                table["before"].append(rows[0])
                steps = (
                    about["steps"] or 20
                )  # too few pairs: the flow has ended without learning, and 20 steps are the rival
                spent = json.loads(next((home / pairs / "steps").glob("*search-1/artifact/artifact.json")).read_text())[
                    "report"
                ]
        learn, test = (f"file:{home / 'search' / 'steps' / name}.jsonl" for name in ("learn", "test"))
        run(home / "more", {
            "task": "instruct", "model": model, "data": {"source": learn}, "methods": [{"slug": "lora", "params": {"r": 8, "alpha": 16}}, {"slug": "clip"}],
            "settings": settings(seed, max_steps=steps, learning_rate=1e-3, batch_size=8),
        })  # fmt: skip
        counted = run(home / "count", {
            "operation": "probe", "task": "instruct", "model": {"source": f"folder:{home / 'more' / 'artifact' / 'merged'}"}, "data": {"source": test},
            "methods": [{"slug": "tool-accuracy", "params": {"rows": "all", "max_tokens": 120}}], "settings": settings(seed),
        })  # fmt: skip
        table["more examples"].append({"exact, all": counted["report"]["numbers"]["exact"]})
    shown = {name: ", ".join(f"{row['exact, all']:.2f}" for row in rows) for name, rows in table.items()}
    mean = {name: sum(row["exact, all"] for row in rows) / len(rows) for name, rows in table.items()}
    effect_row(
        slug="irft-tool-use", behaviour="Exact calls on held-back requests after one round; a small Llama had learned a wrong place for two of six things.",
        baseline=f"the same number of steps ({steps}) of LoRA on the right examples", ours=shown["search"], theirs=shown["more examples"],
        verdict="holds" if mean["search"] > mean["more examples"] else "not seen at this size",
        paper="+6.5 % over the baseline in complex scenarios (abstract)",
        note=f"Before: {shown['before']}; random pairs: {shown['random pairs']}; hard third before and after: "
        + ", ".join(f"{a['exact, hard']:.2f} → {b['exact, hard']:.2f}" for a, b in zip(table["before"], table["search"], strict=True))
        + f"; {spent['generated_tokens'] / max(1, spent['pairs']):.0f} generated tokens a pair.",
    )  # fmt: skip
    assert mean["search"] >= mean["random pairs"], "which piece is better carries the information"
