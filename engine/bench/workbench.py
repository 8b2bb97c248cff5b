"""Builds real runs for benchmarks: a random-weight Llama of a given shape, our own story corpus as data, any list of methods."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.control import Control
from engine.core.events import EventLog
from engine.core.recipe import Recipe, parse_recipe
from engine.ops.check import require
from engine.ops.train import prepare
from engine.starters.corpus import stories
from engine.train.run import Run


def story_file(folder: Path, count: int, seed: int = 5) -> Path:
    """A JSONL file of our own stories."""
    path = folder / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(seed, count)), encoding="utf-8")
    return path


def random_llama(
    folder: Path,
    *,
    hidden: int,
    layers: int,
    ffn: int,
    heads: int,
    vocab: int = 2048,
    positions: int = 1024,
    rows: int | None = None,
) -> Path:
    """A Llama directory with random weights and a tokenizer trained on our stories.

    `rows`: a word table and an output layer of their own, of so many rows, however few the tokenizer uses; without it one table as long as the tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.ops.pretrain import train_tokenizer

    target = folder / f"llama-{hidden}x{layers}{'' if rows is None else f'-{rows}'}"
    if not (target / "config.json").exists():
        tokenizer = train_tokenizer(stories(3, 1500), vocab)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=ffn,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=rows or len(tokenizer),
            max_position_embeddings=positions,
            tie_word_embeddings=rows is None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


class Workbench:
    """A temporary folder with models and data; `run(...)` gives a prepared run of the real engine."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="bonsai-bench-")
        self.folder = Path(self._home.name)
        self._count = 0

    def recipe(
        self,
        model: str,
        data: str,
        methods: list[tuple[str, dict[str, Any]]],
        *,
        task: str = "causal_lm",
        **settings: Any,
    ) -> Recipe:
        return parse_recipe(
            {
                "task": task,
                "model": {"source": model},
                "data": {"source": data},
                "methods": [{"slug": slug, "params": params} for slug, params in methods],
                "settings": settings,
            }
        )

    def run(self, recipe: Recipe) -> Run:
        self._count += 1
        folder = self.folder / f"run-{self._count}"
        folder.mkdir()
        run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
        run.model.train()
        run.begin()
        return run

    def close(self) -> None:
        self._home.cleanup()


def as_peft(run: Run) -> Run:
    """The run with peft's own layers in place of our quicker ones: the LoRA that people have elsewhere, to compare with."""
    from engine.parts.lora_layer import LoraLinear

    for module in run.model.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = LoraLinear.__base__
    return run


def step(run: Run, micro: list[dict[str, Tensor]]) -> None:
    """One engine step on given micro-batches, with everything that the loop does in a step but evaluation and checkpoints."""
    report = run.update_rule.update(run, micro)
    run.clock.step, run.clock.samples, run.clock.tokens = report.step, report.samples, report.tokens
    run.adapt(report)
    run.look(run.record(report))


def forward(run: Run, micro: Mapping[str, Tensor]) -> Tensor:
    """The loss of one micro-batch, for counting what autograd keeps."""
    with run.autocast():
        return run.objective.loss(run.model, micro, run.rng).total
