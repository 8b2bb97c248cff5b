"""Continue texts: a language model learns from plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from engine.core.facts import DataFacts
from engine.core.recipe import Recipe
from engine.tasks.base import Encoded, Row
from engine.tasks.batching import split_rows
from engine.tasks.examples import Examples, Picked, Ragged, starts_of
from engine.tasks.language import LanguageTask, Writer
from engine.tasks.tokens import Tokens

_PROMPT_CHARS = 160


class CausalLM(LanguageTask):
    """Texts are turned into tokens with the tokenizer's own start and end marks, and every token is learned."""

    name = "causal_lm"
    title = "Write like these texts"
    sentence = "A language model that continues a text in the style and with the words of your texts."
    data_shapes = ("text",)
    roles = ("text",)
    packs_examples = True
    fills_rows = True

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        settings = recipe.settings
        length = settings.max_length or 256
        running = data.format == "txt"  # paragraphs of one text belong together, so whole stretches are held back
        stretch = max(1, min(16, len(rows) // 40)) if running else 1
        keys = [number // stretch for number in range(len(rows))] if running else [row["text"] for row in rows]
        train, held = split_rows(keys, [0] * len(rows), settings.holdout, settings.seed)
        notes: list[str] = []
        tokens = Tokens(tokenizer)
        sides: list[Examples] = []
        for side in (train, held):
            documents = _documents(rows, side) if running else [(number, rows[number]["text"]) for number in side]
            sides.append(_examples(documents, tokens, length, settings.packing, notes))
        return Encoded(train=sides[0], holdout=sides[1], holdout_rows=Picked(rows, held), rows=rows, notes=notes,
                       num_train_tokens=sides[0].num_tokens())  # fmt: skip

    def end_mark(self, tokenizer: Any) -> int | None:
        end: int | None = tokenizer.eos_token_id
        return end

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        parts = []
        for row in encoded.holdout_rows[:count]:
            text = row["text"]
            cut = text.rfind(" ", 0, min(_PROMPT_CHARS, max(2, len(text) // 2))) if " " in text else len(text) // 2
            parts.append((text[: max(1, cut)], text[max(1, cut) :]))
        answers = Writer(model, tokenizer).show([prompt for prompt, _ in parts], 48)
        return [
            {"prompt": prompt, "output": answer, "expected": rest[: 2 * _PROMPT_CHARS]}
            for (prompt, rest), answer in zip(parts, answers, strict=True)
        ]


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
    documents: Sequence[tuple[int, str]], tokens: Tokens, length: int, packing: bool, notes: list[str]
) -> Examples:
    ids = _ended(tokens.rows([text for _, text in documents]), tokens.tokenizer.eos_token_id)
    sources = np.array([number for number, _ in documents], np.int64)
    if packing:
        total = len(ids.flat)
        starts = np.append(np.arange(0, total, length), total)
        documents_at = np.searchsorted(ids.starts, starts[:-1], side="right") - 1  # whose token begins each piece
        ids, sources = Ragged(ids.flat, starts), sources[documents_at]
    else:
        cut = int((ids.lengths > length).sum())
        if cut:
            notes.append(
                f"{cut:,} of {len(ids):,} texts are longer than {length} tokens and were cut; packing would keep all of them."
            )
        ids = ids.cut(length)
    return Examples({"input_ids": ids, "labels": ids}, sources, places=np.flatnonzero(ids.lengths > 1))


def _ended(ids: Ragged, end: int | None) -> Ragged:
    """Every row with the end mark behind it, where it has none."""
    if end is None:
        return ids
    filled = ids.lengths > 0
    lasts = np.full(len(ids), -1, np.int64)
    lasts[filled] = ids.flat[ids.starts[1:][filled] - 1]
    open_rows = lasts != end
    starts = starts_of(ids.lengths + open_rows, len(ids))
    flat = np.full(int(starts[-1]), end, np.int32)
    flat[np.repeat(starts[:-1] - ids.starts[:-1], ids.lengths) + np.arange(len(ids.flat))] = ids.flat
    return Ragged(flat, starts)


TASK = CausalLM()
