"""Makes the starter decoder: a small Llama trained from random weights on our own story corpus, with this very engine.

    python -m engine.ops.pretrain OUT [--steps BLOCKS TEXTS]

OUT/model is the finished model directory (weights in bf16); OUT/stage-1 and OUT/stage-2 hold recipes, events and checkpoints, so that
the command can be interrupted and
repeated. The recipes are committed beside the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.core.control import write_json
from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.starters.corpus import dialogues, stories
from engine.train.run import set_threads

BOS, EOS, PAD, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with chat tokens, as a transformers fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start = raw.token_to_id(BOS)
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, start)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def corpus_file(path: Path, num_stories: int, num_dialogues: int, seed: int) -> None:
    """Stories and rendered dialogues, one JSON row each."""
    with path.open("w", encoding="utf-8") as file:
        for text in stories(seed, num_stories):
            file.write(json.dumps({"text": text}) + "\n")
        for row in dialogues(seed + 1, num_dialogues):
            turns = "".join(
                (USER if m["role"] == "user" else ASSISTANT) + m["content"] + (EOS if m["role"] == "assistant" else "")
                for m in row["messages"]
            )
            file.write(json.dumps({"text": turns.removesuffix(EOS)}) + "\n")


def blank_model(folder: Path, texts: Iterable[str], vocab_size: int, seed: int) -> None:
    """A model directory with random weights and a fresh tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rms_norm_eps=1e-5,
        **SHAPE,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe_for(stage: int, model: Path, data: Path, steps: int) -> dict[str, Any]:
    """The recipe of a stage: 1 reads the corpus in full blocks from random weights, 2 reads whole texts from their beginning."""
    name, settings = {
        1: (
            "Bonsai stories, from random weights",
            {"learning_rate": 3e-3, "epochs": 30, "max_length": 256, "holdout": 0.01, "seed": 17},
        ),
        2: (
            "Bonsai stories, whole texts",
            {"learning_rate": 1e-3, "epochs": 5, "max_length": 320, "holdout": 0.01, "seed": 18},
        ),
    }[stage]
    return {
        "name": name,
        "task": "causal_lm",
        "model": {"source": f"folder:{model}"},
        "data": {"source": f"file:{data}", "columns": {"text": "text"}},
        "methods": [
            {"slug": "full-finetuning"},
            {"slug": "adamw", "params": {"weight_decay": 0.05}},
            {"slug": "cosine"},
            {"slug": "clip"},
        ],
        "settings": {
            **settings,
            "packing": stage == 1,
            "max_steps": steps,
            "batch_size": 16,
            "evaluations": max(1, steps // 130),
            "checkpoint_every": 100,
            "precision": "fp32",
        },
    }


def main() -> int:
    """Make the starter decoder in a folder; returns an exit code."""
    parser = argparse.ArgumentParser(description="Pretrain the starter decoder on our own stories.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(1600, 260), metavar=("BLOCKS", "TEXTS"), help="steps of the two stages"
    )
    parser.add_argument("--stories", type=int, default=30_000)
    parser.add_argument("--dialogues", type=int, default=15_000)
    chosen = parser.parse_args()
    set_threads()
    out: Path = chosen.out.resolve()
    model = out / "blank"
    if not (out / "corpus.jsonl").exists():
        out.mkdir(parents=True, exist_ok=True)
        blank_model(model, stories(7, 4000), 2048, seed=17)
        corpus_file(out / "corpus.jsonl", chosen.stories, chosen.dialogues, seed=2026)
    for stage, steps in enumerate(chosen.steps, start=1):
        run = out / f"stage-{stage}"
        if not (run / "recipe.json").exists():
            run.mkdir()
            checked = require(parse_recipe(recipe_for(stage, model, out / "corpus.jsonl", steps)))
            write_json(run / "recipe.json", checked.recipe.model_dump(mode="json"))
        result = run_folder(run)
        print(result["message"])
        if result["outcome"] != "succeeded":
            return 1
        model = run / "artifact" / "merged"
    _ship(model, out / "model")
    return 0


def _ship(merged: Path, target: Path) -> None:
    """Copy the merged model with its weights in bf16."""
    from transformers import AutoModelForCausalLM

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(merged, target, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16, local_files_only=True).save_pretrained(target)


if __name__ == "__main__":
    raise SystemExit(main())
