"""Conversations as tokens: rendered with the model's chat template, with labels on what the assistant says and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from engine.tasks.batching import IGNORED

Conversation = list[dict[str, str]]

# For models that come without a chat format. The end mark follows each answer at once, so that a model learns where to stop; a tokenizer without
# end mark gets a line break there. The answer begins behind "Assistant:" with a space, because most tokenizers keep a space with the next word.
PLAIN_TEMPLATE = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] + (eos_token or '\n') }}"
    "{%- elif message['role'] == 'system' -%}{{ message['content'] + '\n' }}"
    "{%- elif message['role'] == 'tool' -%}{{ 'Tool: ' + message['content'] + '\n' }}"
    "{%- else -%}{{ 'User: ' + message['content'] + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)
# Some templates write today's date into the prompt; with a fixed one a run gives the same tokens tomorrow.
_FIXED = {"date_string": "01 Jan 2025"}


class CannotRender(ValueError):
    """A conversation that the template refuses; its text completes "left out: …"."""


def ensure_template(tokenizer: Any) -> Any:
    """Give a tokenizer our plain chat format when it has none, so that training, prediction and export use the same."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def render(messages: Conversation, tokenizer: Any, *, asking: bool = False) -> str:
    """The conversation as text; `asking` adds what stands before an answer. A template without system messages gets them within the first request."""
    try:
        return _apply(messages, tokenizer, asking)
    except jinja2.TemplateError as error:
        if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            try:
                first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                return _apply([first, *messages[2:]], tokenizer, asking)
            except jinja2.TemplateError:
                pass
        raise CannotRender(f"the model's chat format says '{str(error)[:120].rstrip('.')}'") from error


def encode_conversation(messages: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(input_ids, labels): labels repeat the ids of every assistant turn with its end mark and are -100 elsewhere.

    The tokens before an answer are those that the model sees when it is asked, also where tokenizing the whole text at once would join
    characters across that border.
    """
    text = render(messages, tokenizer)
    spans = _answer_spans(messages, text, tokenizer)
    if not spans:
        raise CannotRender("the model's chat format changes the answers so that they cannot be found again")
    whole = _whole(text, spans, tokenizer) if tokenizer.is_fast else None
    if whole is not None:
        return whole
    ids: list[int] = []
    labels: list[int] = []
    for piece, spoken in _pieces(text, spans):
        tokens = list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        ids += tokens
        labels += tokens if spoken else [IGNORED] * len(tokens)
    return ids, labels


def _apply(messages: Conversation, tokenizer: Any, asking: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking, **_FIXED))


def _answer_spans(messages: Conversation, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where the assistant speaks, in characters: from behind the generation prompt to the end mark."""
    spans: list[tuple[int, int]] = []
    speaking = [place for place, turn in enumerate(messages) if turn["role"] == "assistant" and turn["content"].strip()]
    for place in speaking:
        span = _span(messages, place, text, tokenizer)
        if span is not None and (not spans or span[0] >= spans[-1][1]):
            spans.append(span)
    return spans


def _span(messages: Conversation, place: int, text: str, tokenizer: Any) -> tuple[int, int] | None:
    content = messages[place]["content"].strip()
    try:
        before, after = render(messages[:place], tokenizer, asking=True), render(messages[: place + 1], tokenizer)
    except CannotRender:  # a template may refuse a conversation that begins with an answer
        before = after = ""
    if before and text.startswith(before) and text.startswith(after) and content in after[len(before) :]:
        said = after[len(before) :]
        end = said.rstrip()
        # Without an end mark, the white space behind the answer is the only sign that it is over.
        return len(before), len(before) + len(said if end.endswith(content) else end)
    if place != max(n for n, turn in enumerate(messages) if turn["role"] == "assistant"):
        return None  # this template rewrites earlier turns: only the last answer can be trusted
    start = text.rfind(content)
    return (start, len(text.rstrip())) if start >= 0 else None


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    done = 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [piece for piece in [*pieces, (text[done:], False)] if piece[0]]


def _whole(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The text tokenized at once; None when a token crosses a border, or the tokens before an answer are not those of the prompt alone."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        inside = [at for at, (left, right) in enumerate(offsets) if right > start and left < end and right > left]
        if not inside or offsets[inside[0]][0] < start or offsets[inside[-1]][1] > end:
            return None
        first, last = inside[0], inside[-1]
        if ids[:first] != list(tokenizer(text[:start], add_special_tokens=False)["input_ids"]):
            return None
        labels[first : last + 1] = ids[first : last + 1]
    return ids, labels
