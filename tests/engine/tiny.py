"""Tiny real models and data for tests of the whole engine: random weights, our own stories, our own messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.core.control import write_json
from engine.core.events import LOG_NAME, read_events
from engine.core.method import TrainMethod, WorkMethod
from engine.core.recipe import Recipe, parse_recipe
from engine.core.slots import Slot
from engine.io.tensors import load_tensors, save_tensors
from engine.ops.check import require
from engine.ops.pretrain import train_tokenizer
from engine.starters import starter_data
from engine.starters.corpus import dialogues, stories


class Tiny:
    """A folder with a decoder, an encoder, and data for every task; recipes over them; runs of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._decoder()
        self._encoder()
        with (folder / "stories.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text[:160]}) + "\n" for text in stories(1, 40))
        with (folder / "dialogues.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*dialogues(2, 40), *calls(40)])
        with (folder / "problems.jsonl").open("w") as file:  # a random model hits a digit now and then
            file.writelines(json.dumps(row) + "\n" for row in problems(40))
        with (folder / "pairs.jsonl").open("w") as file:
            things = [
                (a, b) for a in ("bread", "boat", "tree", "bell", "cat", "lamp") for b in ("old", "red", "new", "wet")
            ]
            pairs = (
                {"prompt": f"Is the {a} {b}?", "chosen": f"Yes, the {a} is {b}.", "rejected": "I do not know."}
                for a, b in things
            )
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        rows = Path(starter_data("customer-messages").path).read_text(encoding="utf-8").splitlines()
        (folder / "messages.csv").write_text("\n".join(rows[:65]) + "\n", encoding="utf-8")

    def _decoder(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = train_tokenizer(stories(3, 60), 400)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(self.folder / "decoder")
        tokenizer.save_pretrained(self.folder / "decoder")

    def _encoder(self) -> None:
        from transformers import BertConfig, BertModel

        tokenizer = train_tokenizer(stories(3, 60), 400)
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, vocab_size=len(tokenizer),
            max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, num_labels=2,
        )  # fmt: skip
        BertModel(config).save_pretrained(self.folder / "encoder")
        tokenizer.save_pretrained(self.folder / "encoder")

    def inputs(self, task: str) -> dict[str, Any]:
        """Model and data of a recipe for a task."""
        model, data = {
            "classify": ("encoder", "messages.csv"),
            "instruct": ("decoder", "dialogues.jsonl"),
            "verifiable": ("decoder", "problems.jsonl"),
            "preference": ("decoder", "pairs.jsonl"),
        }.get(task, ("decoder", "stories.jsonl"))
        return {
            "task": task,
            "model": {"source": f"folder:{self.folder / model}"},
            "data": {"source": f"file:{self.folder / data}"},
        }

    def variant(self, number: int) -> Path:
        """The decoder, fine-tuned in a cheap way: every matrix moved a little, differently for every number. 0 is the decoder itself."""
        folder = self.folder / (f"decoder-{number}" if number else "decoder")
        if not folder.exists():
            shutil.copytree(self.folder / "decoder", folder)
            tensors = load_tensors(folder / "model.safetensors")
            generator = torch.Generator().manual_seed(number)
            moved = {
                name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else tensor
                for name, tensor in sorted(tensors.items())
            }
            save_tensors(folder / "model.safetensors", moved, metadata={"format": "pt"})
        return folder

    def recipe_for_work(self, method: type[WorkMethod], **settings: Any) -> Recipe:
        """A small job led by `method` with its tiny preset: as many models as it needs, and a training inside where it wants one."""
        task = method.needs.tasks[0] if method.needs.tasks else "causal_lm"
        plan = {
            "max_steps": 6,
            "batch_size": 4,
            "max_length": 48,
            "learning_rate": 1e-2,
            "evaluations": 2,
            "precision": "fp32",
            "live_samples": 0,
            **settings,
        }
        inside = [("full-finetuning", {})] if method.training == "required" else []
        refs = [(method.card.slug, method.presets["tiny"]), *inside]
        body = {
            **self.inputs(task),
            "operation": method.role,
            "models": [{"source": f"folder:{self.variant(number)}"} for number in range(1, method.num_models[0])],
            "methods": [{"slug": slug, "params": dict(params)} for slug, params in refs],
            "settings": plan,
        }
        return require(parse_recipe(body)).recipe

    def recipe(
        self, methods: list[tuple[str, Mapping[str, Any]]], *, task: str = "causal_lm", **settings: Any
    ) -> Recipe:
        """A recipe of a few quick steps, with every open setting filled."""
        plan = {"epochs": 2, "max_steps": 8, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2, "evaluations": 2,
                "checkpoint_every": 3, "precision": "fp32", "live_samples": 0, **settings}  # fmt: skip
        refs = [{"slug": slug, "params": dict(params)} for slug, params in methods]
        return require(parse_recipe({**self.inputs(task), "methods": refs, "settings": plan})).recipe

    def recipe_for(self, method: type[TrainMethod], **settings: Any) -> Recipe:
        """A recipe in which `method` stands with its tiny preset, beside whatever else a run needs."""
        task = (
            method.needs.tasks[0]
            if method.needs.tasks
            else "classify"
            if "encoder" in method.needs.kinds
            else "causal_lm"
        )
        own = (method.card.slug, method.presets["tiny"])
        needed = [] if Slot.PARAMETRIZATION in method.slots else [("full-finetuning", {})]
        return self.recipe([*needed, own], task=task, **settings)


def problems(count: int) -> list[dict[str, str]]:
    """Sums of three digits modulo ten, each with a hint that names the first step, unless that would be the answer."""
    rows = []
    for number in range(count):
        a, b, c = number % 7, (3 * number + 1) % 10, (number // 3) % 5 + 1
        rows.append({"question": f"{a} + {b} + {c}", "answer": str((a + b + c) % 10), "hint": f"begin with {a + b}"})
    return rows


def calls(count: int) -> list[dict[str, Any]]:
    """Conversations that end with a tool call, short enough for the tiny models."""
    things = ("lamp", "door", "bell", "boat")
    return [
        {
            "messages": [
                {"role": "user", "content": f"Set the {things[n % 4]} to {n}."},
                {"role": "assistant", "content": f"set(what='{things[n % 4]}', to={n})"},
            ]
        }
        for n in range(count)
    ]


def lay(folder: Path, recipe: Recipe) -> Path:
    """Put a recipe into a fresh job folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    return folder


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """The deterministic columns of every step in the log."""
    timing = {"seconds", "tokens_per_second", "memory"}
    return [
        {key: value for key, value in row.items() if key not in timing}
        for event, _ in read_events(folder / LOG_NAME)
        if event.kind == "metric"
        for row in event.data["rows"]
    ]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The data of every event of a kind, with its step."""
    return [{"step": event.step, **event.data} for event, _ in read_events(folder / LOG_NAME) if event.kind == kind]
