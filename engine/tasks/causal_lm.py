"""Continue texts: a language model learns from plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from engine.core.facts import DataFacts
from engine.core.recipe import Recipe
from engine.tasks.base import Encoded, Example, Row
from engine.tasks.batching import split_rows
from engine.tasks.language import LanguageTask, Writer

_PROMPT_CHARS = 160


class CausalLM(LanguageTask):
    """Texts are turned into tokens with the tokenizer's own start and end marks, and every token is learned."""

    name = "causal_lm"
    title = "Write like these texts"
    sentence = "A language model that continues a text in the style and with the words of your texts."
    data_shapes = ("text",)
    roles = ("text",)
    fills_rows = True

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        settings = recipe.settings
        length = settings.max_length or 256
        running = data.format == "txt"  # paragraphs of one text belong together, so whole stretches are held back
        stretch = max(1, min(16, len(rows) // 40)) if running else 1
        keys = [number // stretch for number in range(len(rows))] if running else [row["text"] for row in rows]
        train, held = split_rows(keys, [0] * len(rows), settings.holdout, settings.seed)
        notes: list[str] = []
        sides: list[list[Example]] = []
        for side in (train, held):
            documents = _documents(rows, side) if running else [(number, rows[number]["text"]) for number in side]
            sides.append(_examples(documents, tokenizer, length, settings.packing, notes))
        return Encoded(train=sides[0], holdout=sides[1], holdout_rows=[rows[number] for number in held], rows=rows, notes=notes,
                       num_train_tokens=sum(map(len, sides[0])))  # fmt: skip

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        writer = Writer(model, tokenizer)
        found = []
        for row in encoded.holdout_rows[:count]:
            text = row["text"]
            cut = text.rfind(" ", 0, min(_PROMPT_CHARS, max(2, len(text) // 2))) if " " in text else len(text) // 2
            prompt, rest = text[: max(1, cut)], text[max(1, cut) :]
            answer = writer.predict([prompt], max_new_tokens=48)[0]
            found.append({"prompt": prompt, "output": answer["text"], "expected": rest[: 2 * _PROMPT_CHARS]})
        return found


def _documents(rows: Sequence[Row], side: Sequence[int]) -> list[tuple[int, str]]:
    """Neighbouring paragraphs joined again, with the row number of the first."""
    found: list[tuple[int, list[str]]] = []
    previous = -2
    for number in side:
        if number != previous + 1:
            found.append((number, []))
        found[-1][1].append(rows[number]["text"])
        previous = number
    return [(number, "\n\n".join(texts)) for number, texts in found]


def _examples(
    documents: Sequence[tuple[int, str]], tokenizer: Any, length: int, packing: bool, notes: list[str]
) -> list[Example]:
    end = tokenizer.eos_token_id
    encoded = tokenizer([text for _, text in documents], return_attention_mask=False)["input_ids"] if documents else []
    if end is not None:
        encoded = [ids if ids and ids[-1] == end else [*ids, end] for ids in encoded]
    if packing:
        stream = [token for ids in encoded for token in ids]
        sources = [number for (number, _), ids in zip(documents, encoded, strict=True) for _ in ids]
        pieces = [(stream[at : at + length], sources[at]) for at in range(0, len(stream), length)]
    else:
        pieces = [(ids[:length], number) for (number, _), ids in zip(documents, encoded, strict=True)]
        cut = sum(len(ids) > length for ids in encoded)
        if cut:
            notes.append(
                f"{cut:,} of {len(encoded):,} texts are longer than {length} tokens and were cut; packing would keep all of them."
            )
    return [Example(ids, list(ids), number) for ids, number in pieces if len(ids) > 1]


TASK = CausalLM()
