"""A model that is asked for tool calls: the loss of a right answer, sampled and greedy answers behind a beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.parts.sampling import completion_batch, sample, sequence_logprobs
from engine.parts.tool_calls import calls_in
from engine.parts.tree_search import Completion

Messages = list[dict[str, str]]


def last_answer(messages: Messages) -> tuple[Messages, str]:
    """(everything before the last answer, the last answer); ([], "") when there is none."""
    for place in range(len(messages) - 1, 0, -1):
        if messages[place]["role"] == "assistant":
            return messages[:place], messages[place]["content"].strip()
    return [], ""


def is_call(text: str) -> bool:
    """Whether an answer is a tool call."""
    return calls_in(text) is not None


class Talker:
    """Speaks for the first input model of a job. `inputs` is an engine.ops.work.Inputs of the goal *instruct*."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.model, self.tokenizer = inputs.model, inputs.tokenizer
        self.answerer: Any = inputs.task.predictor(self.model, self.tokenizer, inputs.facts.data)
        self.num_generated = 0

    def prompt(self, asked: Messages, prefix: str = "") -> list[int]:
        """The tokens of a request with the beginning of its answer."""
        head = list(self.answerer.prompt_ids(asked))
        if not prefix:
            return head
        text = self.tokenizer.decode(head, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = list(self.tokenizer(text + prefix, add_special_tokens=False)["input_ids"])
        # Joining may change the tokens of the request; then the beginning is tokenized by itself.
        return (
            whole
            if whole[: len(head)] == head
            else [*head, *self.tokenizer(prefix, add_special_tokens=False)["input_ids"]]
        )

    @torch.no_grad()
    def loss(self, asked: Messages, gold: str) -> float:
        """The loss per token of the right answer."""
        head = self.prompt(asked)
        tail = self.prompt(asked, gold)[len(head) :]
        batch = completion_batch([(head, tail)], self.tokenizer.pad_token_id)
        moved = {key: value.to(self.inputs.device) for key, value in batch.items()}
        sums, counts = sequence_logprobs(self.model, moved)
        return float(-sums[0] / counts[0])

    def tries(
        self, asked: Messages, prefix: str, count: int, most: int, temperature: float, generator: torch.Generator
    ) -> Sequence[Completion]:
        """Sampled completions of a beginning."""
        found = sample(
            self.model, [self.prompt(asked, prefix)] * count, max_new_tokens=most, ends=self.answerer.ends,
            pad=self.tokenizer.pad_token_id, temperature=temperature, generator=generator,
        )  # fmt: skip
        self.num_generated += sum(len(one.ids) for one in found)
        return [
            Completion(self._text(one.ids), one.ended, sum(one.logprobs) / max(1, len(one.logprobs))) for one in found
        ]

    def finish(self, asked: Messages, prefix: str, most: int) -> str:
        """The likeliest completion of a beginning."""
        one = sample(
            self.model, [self.prompt(asked, prefix)], max_new_tokens=most, ends=self.answerer.ends,
            pad=self.tokenizer.pad_token_id, temperature=0.0,
        )[0]  # fmt: skip
        self.num_generated += len(one.ids)
        return self._text(one.ids)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
