"""Prefer better answers: each row shows a better and a worse answer to one request."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.errors import bad_input
from engine.core.facts import DataFacts, Facts, ModelFacts
from engine.core.recipe import Recipe
from engine.io.datasets import read_rows
from engine.tasks.base import Encoded, Example, Predictor, Row
from engine.tasks.batching import IGNORED, bucketed, measuring, moved, padded, padded_batch, split_rows
from engine.tasks.chat import CannotRender, Conversation, encode_conversations, ensure_template, render
from engine.tasks.examples import Examples, Ints, Ragged, encoded_of, rows_of, sources_of
from engine.tasks.instruct import Answerer
from engine.tasks.language import LanguageTask, general_examples

_YES = {"yes", "true", "1"}
Side = tuple[Ints, Ints]  # ids and labels of one answer behind its prompt


@dataclass(slots=True)
class Pair(Example):
    """The better answer stands in `input_ids` and `labels`, the worse one here, behind the same prompt."""

    measured: ClassVar[tuple[str, ...]] = ("input_ids", "other_ids")

    other_ids: list[int]
    other_labels: list[int]

    def __len__(self) -> int:
        return max(len(self.input_ids), len(self.other_ids))

    def token_rows(self) -> tuple[list[int], ...]:
        return (self.input_ids, self.other_ids)


class Preference(LanguageTask):
    """Both answers are written behind the same prompt in the model's chat format, and only their tokens count.

    A micro-batch of B pairs is one batch of 2 B rows: the better answers, then the worse ones in the same order; `source` [B] says which row of
    the data a pair is. With the role `prefix` the answers continue the beginning of an answer; with `open` = yes they are fragments that do not
    end (or only one of them: `open` = chosen, rejected), so no end mark is put behind them.
    """

    name = "preference"
    title = "Prefer better answers"
    sentence = "An assistant that answers more like the better of two answers, and less like the worse."
    data_shapes = ("preferences",)
    roles = ("prompt", "chosen", "rejected")
    example_type = Pair
    rows_per_example = 2

    def rows(self, data: DataFacts) -> Iterator[Row]:
        yield from read_rows(data)

    def load_tokenizer(self, facts: ModelFacts) -> Any:
        return ensure_template(super().load_tokenizer(facts))

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        settings = recipe.settings
        length = settings.max_length or 512
        trouble: Counter[str] = Counter()
        found: list[tuple[int, Side, Side]] = []
        sides = encoded_sides(rows, tokenizer)
        for number, (better, worse) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
            refused = next((side for side in (better, worse) if isinstance(side, CannotRender)), None)
            if isinstance(better, CannotRender) or isinstance(worse, CannotRender):
                trouble[str(refused)] += 1
            elif all(np.array_equal(one, other) for one, other in zip(better, worse, strict=True)):
                trouble["both answers are the same"] += 1
            elif max(len(better[0]), len(worse[0])) > length:
                trouble[f"they are longer than {length} tokens, and a cut answer cannot be judged"] += 1
            elif not all((labels != IGNORED).any() for _, labels in (better, worse)):
                trouble["an answer has no tokens"] += 1
            else:
                found.append((number, better, worse))
        notes = [f"{count:,} of {len(rows):,} pairs were left out: {reason}." for reason, count in trouble.items()]
        if len(found) < 2:
            raise bad_input(
                "data",
                "No pair is left to learn from.",
                " ".join(notes),
                "Allow a longer longest text, or mend the data.",
                "no_examples",
            )
        keys = [str(rows[number]["prompt"]) for number, _, _ in found]  # pairs about one request fall on the same side
        train, held = split_rows(keys, [0] * len(found), settings.holdout, settings.seed)
        if not held or not train:
            raise bad_input("data", "These pairs are all about one request.", "Some requests must be kept back to measure on.",
                            "Add pairs about other requests.", "no_holdout")  # fmt: skip
        columns = {
            "input_ids": Ragged.of([better[0] for _, better, _ in found]),
            "labels": Ragged.of([better[1] for _, better, _ in found]),
            "other_ids": Ragged.of([worse[0] for *_, worse in found]),
            "other_labels": Ragged.of([worse[1] for *_, worse in found]),
        }
        pairs = Examples(columns, np.array([number for number, _, _ in found], np.int64), Pair)
        return encoded_of(pairs, train, held, rows, notes)

    def batches(
        self, examples: Sequence[Example], order: Sequence[int], batch_size: int, recipe: Recipe
    ) -> list[list[int]]:
        return bucketed(examples, order, batch_size)

    def collate(self, examples: Sequence[Example], tokenizer: Any, recipe: Recipe) -> dict[str, Tensor]:
        return pair_batch(examples, tokenizer.pad_token_id)

    def evaluate(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> dict[str, Any]:
        """eval_loss is -log sigmoid of the difference of the mean log-probabilities per token: how surely it prefers the better answer.

        eval_accuracy is the share of pairs of which it prefers the better answer, eval_chosen_loss the loss per token of the better answers.
        """
        margin, nll = self._margins(model, encoded, tokenizer, device)
        losses = functional.softplus(-margin)
        count = len(margin)
        right = (margin > 0).double()
        general = self.measure(model, general_examples(tokenizer), tokenizer, device)
        return {
            "eval_loss": float(losses.mean()),
            "eval_loss_se": float(losses.std(unbiased=count > 1)) / math.sqrt(count),
            "eval_accuracy": float(right.mean()),
            "eval_margin": float(margin.mean()),
            "eval_chosen_loss": float(nll.mean()),
            "general_loss": general["eval_loss"],
            "general_loss_se": general["eval_loss_se"],
        }

    def judged(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> list[dict[str, Any]]:
        margin, _ = self._margins(model, encoded, tokenizer, device)
        losses = functional.softplus(-margin).tolist()
        return [
            {"row": pair.source, "loss": loss, "weight": 1.0, "right": difference > 0, "prompt": str(row["prompt"])}
            for pair, row, loss, difference in zip(
                encoded.holdout, encoded.holdout_rows, losses, margin.tolist(), strict=True
            )
        ]

    def _margins(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(mean log-probability per token of the better answer minus that of the worse one, loss per token of the better one), fp64 [N]."""
        margins: list[Tensor] = []
        chosen: list[Tensor] = []
        with measuring(model):
            for start in range(0, len(encoded.holdout), 8):
                batch = moved(pair_batch(encoded.holdout[start : start + 8], tokenizer.pad_token_id), device)
                sums, counts = self.sequence_scores(model, batch)
                better, worse = (sums / counts).chunk(2)
                margins.append((better - worse).double().cpu())
                chosen.append(better.double().cpu())
        return torch.cat(margins), -torch.cat(chosen)

    def sequence_scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(sum of log-probabilities [2 B], number of counted tokens [2 B]) of every row, with gradient, in fp32."""
        logits, targets = self.forward_logits(model, batch)  # [N, vocab], [N], row by row
        each = -functional.cross_entropy(logits.float(), targets, reduction="none")
        counted = batch["labels"][:, 1:] != IGNORED
        rows = counted.nonzero()[:, 0]
        sums = torch.zeros(len(counted), dtype=each.dtype, device=each.device).index_add(0, rows, each)
        return sums, counted.sum(1)

    def baseline(
        self,
        untouched: Callable[[], nn.Module],
        first_scores: Mapping[str, Any],
        encoded: Encoded,
        tokenizer: Any,
        facts: Facts,
        device: torch.device,
    ) -> dict[str, Any]:
        sentence = (
            f"Before training, the model found the better answer likelier in {first_scores['eval_accuracy']:.0%} of the "
            "held-out pairs."
        )
        return {"name": "the same model before training", "sentence": sentence, **first_scores}

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        rows = [
            row for row in encoded.holdout_rows[:count] if not row.get("prefix")
        ]  # fragments say nothing by themselves
        asked = [_asked(row) for row in rows]
        answers = Answerer(model, tokenizer).show(asked, 64)
        return [
            {"prompt": said[-1]["content"], "output": answer, "expected": str(row["chosen"])}
            for row, said, answer in zip(rows, asked, answers, strict=True)
        ]

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts) -> Predictor:
        return Answerer(model, ensure_template(tokenizer))


def pair_batch(pairs: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """B pairs as 2 B rows, the better answers first."""
    ids = [*rows_of(pairs, "input_ids"), *rows_of(pairs, "other_ids")]
    labels = [*rows_of(pairs, "labels"), *rows_of(pairs, "other_labels")]
    return {
        **padded_batch(ids, pad, len(pairs)),
        "labels": padded(labels, IGNORED),
        "source": torch.tensor(sources_of(pairs)),
    }


def _asked(row: Row) -> Conversation:
    prompt = row["prompt"]
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]


def encoded_sides(rows: Sequence[Row], tokenizer: Any) -> list[Side | CannotRender]:
    """(input_ids, labels) of the better and the worse answer of each row, one behind the other. Whole answers are written as conversations, all at once."""
    asked = [(row, side) for row in rows for side in ("chosen", "rejected")]
    whole = [not (row.get("prefix") or _is_open(row, side)) for row, side in asked]
    talks = [
        [*_asked(row), {"role": "assistant", "content": str(row[side])}]
        for (row, side), one in zip(asked, whole, strict=True)
        if one
    ]
    told = iter(encode_conversations(talks, tokenizer))
    return [
        next(told) if one else _fragment(row, side, tokenizer) for (row, side), one in zip(asked, whole, strict=True)
    ]


def _is_open(row: Row, side: str) -> bool:
    said = str(row.get("open") or "").lower()
    return said in _YES or said == side


def _fragment(row: Row, side: str, tokenizer: Any) -> Side | CannotRender:
    """An answer that goes on from a prefix or does not end; only what differs between the two answers can count, so the prefix does not."""
    answer = row[side]
    try:
        before = render(_asked(row), tokenizer, asking=True) + str(row.get("prefix") or "")
    except CannotRender as error:
        return error
    head = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(before + str(answer), add_special_tokens=False)["input_ids"])
    # Where joining changes the tokens of the prompt, the answer is tokenized by itself: the model will see the prompt's own tokens.
    tail = (
        whole[len(head) :]
        if whole[: len(head)] == head
        else list(tokenizer(str(answer), add_special_tokens=False)["input_ids"])
    )
    if not _is_open(row, side) and tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    return np.array([*head, *tail], np.int32), np.array([*[IGNORED] * len(head), *tail], np.int32)


TASK = Preference()
