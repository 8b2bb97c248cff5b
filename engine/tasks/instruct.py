"""Answer requests: a language model learns from conversations, and only from what the assistant says in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from engine.core.errors import bad_input
from engine.core.facts import DataFacts, ModelFacts
from engine.core.recipe import Recipe
from engine.io.datasets import read_rows
from engine.io.shapes import messages_of
from engine.tasks.base import Encoded, Predictor, Row
from engine.tasks.batching import IGNORED, split_rows
from engine.tasks.chat import (
    CannotRender,
    Conversation,
    encode_conversation,
    encode_conversations,
    ensure_template,
    render,
)
from engine.tasks.examples import Examples, Ints, Ragged, encoded_of
from engine.tasks.language import LanguageTask, Writer


class Instruct(LanguageTask):
    """Conversations are written in the model's own chat format; every token that the assistant says is learned, with its end mark."""

    name = "instruct"
    title = "Answer like these examples"
    sentence = "An assistant that answers requests the way your examples do."
    data_shapes = ("messages", "instruction", "problems")
    roles = ("messages",)
    packs_examples = True

    def rows(self, data: DataFacts) -> Iterator[Row]:
        for row in read_rows(data):
            yield row if "messages" in row else {"messages": as_messages(row)}

    def load_tokenizer(self, facts: ModelFacts) -> Any:
        return ensure_template(super().load_tokenizer(facts))

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        settings = recipe.settings
        length = settings.max_length or 512
        trouble: Counter[str] = Counter()
        found: list[tuple[int, Ints, Ints]] = []  # row, ids, labels
        num_cut = 0
        for number, one in enumerate(encode_conversations([row["messages"] for row in rows], tokenizer)):
            if isinstance(one, CannotRender):
                trouble[str(one)] += 1
                continue
            ids, labels = one
            num_cut += len(ids) > length
            if (labels[1:length] != IGNORED).any():
                found.append((number, ids[:length], labels[:length]))
            else:
                trouble[f"their answers begin behind the longest text of {length} tokens"] += 1
        notes = [
            f"{count:,} of {len(rows):,} conversations were left out: {reason}." for reason, count in trouble.items()
        ]
        if num_cut:
            notes.append(
                f"{num_cut:,} of {len(rows):,} conversations are longer than {length} tokens and were cut at the end."
            )
        if len(found) < 2:
            raise bad_input(
                "data",
                "No conversation is left to learn from.",
                " ".join(notes),
                "Allow a longer longest text, or mend the data.",
                "no_examples",
            )
        keys = [str(rows[number]["messages"]) for number, _, _ in found]
        train, held = split_rows(keys, [0] * len(found), settings.holdout, settings.seed)
        return encoded_of(supervised(found), train, held, rows, notes)

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        parts: list[tuple[Conversation, str, str]] = []
        for row in encoded.holdout_rows[:count]:
            said: Conversation = row["messages"]
            last = max(place for place, turn in enumerate(said) if turn["role"] == "assistant")
            asked = next((turn["content"] for turn in reversed(said[:last]) if turn["role"] != "assistant"), "")
            parts.append((said[:last], asked, said[last]["content"]))
        answers = Answerer(model, tokenizer).show([before for before, _, _ in parts], 64)
        return [
            {"prompt": asked, "output": answer, "expected": expected}
            for (_, asked, expected), answer in zip(parts, answers, strict=True)
        ]

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts) -> Predictor:
        return Answerer(model, ensure_template(tokenizer))


class Answerer(Writer):
    """Answers a request (a text) or a conversation (a list of messages) in the format that was trained."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        probe, labels = encode_conversation(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer
        )
        spoken = [token for token, label in zip(probe, labels, strict=True) if label != IGNORED]
        if spoken and spoken[-1] in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
            self.ends = sorted(
                {*self.ends, spoken[-1]}
            )  # the mark that ends a turn, where the model's config names another

    def prompt_ids(self, given: Any) -> list[int]:
        if isinstance(given, str) and given.strip():
            messages: Conversation = [{"role": "user", "content": given.strip()}]
        elif isinstance(given, list) and given:
            messages = messages_of(given, 1, "messages")
        else:
            raise bad_input(
                "inputs",
                "There is nothing to answer.",
                "Each input is a request or a list of messages.",
                "Write a request.",
                "bad_prompt",
            )
        try:
            text = render(messages, self.tokenizer, asking=True)
        except CannotRender as error:
            raise bad_input("inputs", "This conversation does not fit the model's chat format.", f"It says: {error}.",
                            "Begin with a request and take turns.", "bad_prompt") from error  # fmt: skip
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def shown(self, prompt: list[int], tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def supervised(found: Sequence[tuple[int, Ints, Ints]]) -> Examples:
    """Examples of (row, ids, labels)."""
    columns = {
        "input_ids": Ragged.of([ids for _, ids, _ in found]),
        "labels": Ragged.of([labels for *_, labels in found]),
    }
    return Examples(columns, np.array([number for number, _, _ in found], np.int64))


def as_messages(row: Row) -> Conversation:
    """A request with its answer as a conversation: the input stands below the instruction. A problem is answered by its worked solution."""
    if "question" in row:
        told = row.get("solution") or row["answer"]
        return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": told}]
    asked = "\n\n".join(row[role] for role in ("instruction", "input") if row.get(role))
    system: Conversation = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


TASK = Instruct()
