"""Solve problems whose answers can be checked: numbers, letters, names. An answer is read and compared, never run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engine.core.errors import bad_input
from engine.core.facts import DataFacts, Facts, ModelFacts
from engine.core.recipe import Recipe
from engine.io.datasets import read_rows
from engine.tasks.base import Encoded, Predictor, Row
from engine.tasks.batching import measuring, split_rows
from engine.tasks.chat import CannotRender, Conversation, encode_conversations, ensure_template, render, render_all
from engine.tasks.checkers import Reference, gives_away, is_right, reference_of
from engine.tasks.examples import Ints, encoded_of
from engine.tasks.instruct import Answerer, supervised
from engine.tasks.language import LanguageTask, likeliest
from engine.tasks.tokens import Tokens

MAX_MEASURED = 256  # problems that one evaluation solves
MAX_WORDS = 12  # a longer reference text can hardly be met word for word
_AT_A_TIME = 32


class Verifiable(LanguageTask):
    """Each row is a question with the answer that is right; a hint and a worked solution may stand beside them.

    Supervised objectives learn the worked solution (or the answer); reinforcement learns from the check alone.
    """

    name = "verifiable"
    title = "Solve problems with checkable answers"
    sentence = "A model that works out answers, measured by how many of them are right."
    data_shapes = ("problems", "instruction")
    roles = ("question", "answer")
    packs_examples = True

    def rows(self, data: DataFacts) -> Iterator[Row]:
        for row in read_rows(data):
            yield row if "question" in row else as_problem(row)

    def load_tokenizer(self, facts: ModelFacts) -> Any:
        return ensure_template(super().load_tokenizer(facts))

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        settings = recipe.settings
        length = settings.max_length or 512
        trouble: Counter[str] = Counter()
        found: list[tuple[int, Ints, Ints]] = []  # row, ids, labels
        num_cut = 0
        checkable = [number for number, row in enumerate(rows) if _can_be_checked(self.reference(row))]
        if len(checkable) < len(rows):
            said = f"their answers are longer than {MAX_WORDS} words and name no final answer"
            trouble[said] = len(rows) - len(checkable)
        asked = render_all([_asked(rows[number]) for number in checkable], tokenizer, asking=True)
        texts = [text if isinstance(text, str) else "" for text in asked]
        prompts = Tokens(tokenizer).rows(texts, special=False).lengths.tolist()
        told = encode_conversations([[*_asked(rows[n]), *_told(rows[n])] for n in checkable], tokenizer)
        for number, prompt, taken, one in zip(checkable, asked, prompts, told, strict=True):
            refused = next((each for each in (prompt, one) if isinstance(each, CannotRender)), None)
            if refused is not None or isinstance(one, CannotRender):
                trouble[str(refused)] += 1
                continue
            ids, labels = one
            num_cut += len(ids) > length
            if taken >= length:
                trouble[f"their questions leave no room for an answer within {length} tokens"] += 1
                continue
            found.append((number, ids[:length], labels[:length]))
        notes = [f"{count:,} of {len(rows):,} problems were left out: {reason}." for reason, count in trouble.items()]
        if num_cut:
            notes.append(f"{num_cut:,} of {len(rows):,} solutions are longer than {length} tokens and were cut.")
        if len(found) < 2:
            raise bad_input(
                "data",
                "No problem is left to learn from.",
                " ".join(notes),
                "Give each row a short answer: a number, a letter, a name, or a solution that ends in '#### 18'.",
                "no_examples",
            )
        keys = [str(rows[number]["question"]) for number, _, _ in found]
        train, held = split_rows(keys, [0] * len(found), settings.holdout, settings.seed)
        if len(held) > MAX_MEASURED:
            notes.append(
                f"{len(held):,} problems are kept back; each measurement solves {MAX_MEASURED} of them, always the same."
            )
        return encoded_of(supervised(found), train, held, rows, notes)

    # ── what reinforcement asks for ───────────────────────────────────────────────────────────────────────────────────

    def reference(self, row: Row) -> Reference:
        """The answer of a row, ready to compare with."""
        return reference_of(str(row["answer"]))

    def prompt_ids(self, row: Row, tokenizer: Any, hint: str = "") -> list[int]:
        """The tokens that a model sees when it is asked; a hint stands below the question."""
        return list(tokenizer(render(_asked(row, hint), tokenizer, asking=True), add_special_tokens=False)["input_ids"])

    def reward(self, row: Row, text: str) -> float:
        """1 for a right final answer, 0 for anything else."""
        return float(is_right(text, self.reference(row)))

    def hint(self, row: Row) -> str:
        """The hint of a row, or nothing."""
        return str(row.get("hint") or "")

    def leaks(self, row: Row) -> bool:
        """Whether the hint of a row holds its answer."""
        return gives_away(self.hint(row), self.reference(row))

    def ends(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """The tokens that end an answer."""
        return Answerer(model, tokenizer).ends

    def text_of(self, tokens: Sequence[int], tokenizer: Any) -> str:
        """Generated tokens as text."""
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    # ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> dict[str, Any]:
        scores = super().evaluate(model, encoded, tokenizer, recipe, device)
        rows = encoded.holdout_rows[:MAX_MEASURED]
        texts = self.answers(model, rows, tokenizer, recipe.settings.max_length or 512)
        right = sum(self.reward(row, text) for row, text in zip(rows, texts, strict=True))
        share = right / max(1, len(rows))
        return {
            "eval_accuracy": share,
            "eval_accuracy_se": math.sqrt(share * (1 - share) / max(1, len(rows))),
            "num_solved": int(right),
            "num_measured": len(rows),
            **scores,
        }

    def judged(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> list[dict[str, Any]]:
        found = super().judged(model, encoded, tokenizer, recipe, device)
        rows = encoded.holdout_rows[:MAX_MEASURED]
        texts = self.answers(model, rows, tokenizer, recipe.settings.max_length or 512)
        for item, row, text in zip(found, rows, texts, strict=False):
            item |= {"right": self.reward(row, text) > 0, "prompt": str(row["question"]), "output": text,
                     "expected": str(self.reference(row))}  # fmt: skip
        return found

    def answers(self, model: nn.Module, rows: Sequence[Row], tokenizer: Any, length: int) -> list[str]:
        """The likeliest answer to each question, without hints; question and answer together have at most `length` tokens."""
        prompts = [self.prompt_ids(row, tokenizer) for row in rows]
        ends = self.ends(model, tokenizer)
        texts = [""] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
        with measuring(model):
            for start in range(0, len(rows), _AT_A_TIME):
                part = by_length[start : start + _AT_A_TIME]
                room = [max(0, length - len(prompts[index])) for index in part]
                said = likeliest(model, [prompts[index] for index in part], max(room), ends, tokenizer.pad_token_id)
                for index, tokens, most in zip(part, said, room, strict=True):
                    texts[index] = self.text_of(tokens[:most], tokenizer)
        return texts

    def goodness(self, scores: Mapping[str, Any]) -> tuple[float, ...]:
        return float(scores["eval_accuracy"]), -float(scores["eval_loss"])

    def baseline(
        self,
        untouched: Callable[[], nn.Module],
        first_scores: Mapping[str, Any],
        encoded: Encoded,
        tokenizer: Any,
        facts: Facts,
        device: torch.device,
    ) -> dict[str, Any]:
        solved, number = int(first_scores["num_solved"]), int(first_scores["num_measured"])
        sentence = (
            f"Before training, the model solved {solved:,} of {number:,} held-out problems "
            f"({first_scores['eval_accuracy']:.1%}), each with its likeliest answer and without a hint."
        )
        return {"name": "the same model before training", "sentence": sentence, **first_scores}

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        answerer = Answerer(model, tokenizer)
        rows = encoded.holdout_rows[:count]
        longest = max((len(example) for example in encoded.holdout), default=64)
        answers = answerer.show([_asked(row) for row in rows], max(16, min(longest, 256)))
        return [
            {"prompt": str(row["question"]), "output": answer, "expected": str(self.reference(row))}
            for row, answer in zip(rows, answers, strict=True)
        ]

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts) -> Predictor:
        return Answerer(model, ensure_template(tokenizer))


def _can_be_checked(reference: Reference) -> bool:
    return reference.kind != "text" or 0 < len(str(reference).split()) <= MAX_WORDS


def as_problem(row: Row) -> Row:
    """A request with its answer, as a problem."""
    question = "\n\n".join(row[role] for role in ("instruction", "input") if row.get(role))
    return {"question": question, "answer": row["output"]}


def _asked(row: Row, hint: str = "") -> Conversation:
    question = str(row["question"])
    return [{"role": "user", "content": f"{question}\n\nHint: {hint}" if hint else question}]


def _told(row: Row) -> Conversation:
    """What a teacher would say: the worked solution, with the final answer below it where the solution does not end in it."""
    answer, solution = str(row["answer"]), str(row.get("solution") or "")
    if solution and not is_right(solution, reference_of(answer)):
        solution = f"{solution}\n#### {answer}"
    return [{"role": "assistant", "content": solution or answer}]


TASK = Verifiable()
