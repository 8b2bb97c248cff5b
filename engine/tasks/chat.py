"""Conversations as tokens: rendered with the model's chat template, with labels on what the assistant says and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np

from engine.tasks.batching import IGNORED
from engine.tasks.examples import Ints
from engine.tasks.tokens import Tokens, with_offsets

Conversation = list[dict[str, str]]
Span = tuple[int, int]  # of characters
_AT_A_TIME = 512

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
    if not messages:
        raise CannotRender("the model's chat format says nothing about an empty conversation")
    try:
        return str(_apply(messages, tokenizer, asking))
    except jinja2.TemplateError as error:
        if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            try:
                first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                return str(_apply([first, *messages[2:]], tokenizer, asking))
            except jinja2.TemplateError:
                pass
        raise CannotRender(f"the model's chat format says '{str(error)[:120].rstrip('.')}'") from error


def render_all(
    conversations: Sequence[Conversation], tokenizer: Any, *, asking: bool = False
) -> list[str | CannotRender]:
    """`render` of many: one call of the tokenizer, and one for each conversation only where a template refuses one of them."""
    if all(conversations) and conversations:
        with contextlib.suppress(jinja2.TemplateError):
            return [str(text) for text in _apply(conversations, tokenizer, asking)]
    found: list[str | CannotRender] = []
    for messages in conversations:
        try:
            found.append(render(messages, tokenizer, asking=asking))
        except CannotRender as error:
            found.append(error)
    return found


def encode_conversation(messages: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(input_ids, labels): labels repeat the ids of every assistant turn with its end mark and are -100 elsewhere.

    The tokens before an answer are those that the model sees when it is asked, also where tokenizing the whole text at once would join
    characters across that border.
    """
    found = encode_conversations([messages], tokenizer)[0]
    if isinstance(found, CannotRender):
        raise found
    return found[0].tolist(), found[1].tolist()


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Any
) -> list[tuple[Ints, Ints] | CannotRender]:
    """`encode_conversation` of many, a few hundred in memory at a time; what cannot be rendered stands in its place as an error."""
    tokens = Tokens(tokenizer)
    return [
        found
        for at in range(0, len(conversations), _AT_A_TIME)
        for found in _encoded_together(conversations[at : at + _AT_A_TIME], tokens)
    ]


def _encoded_together(
    conversations: Sequence[Conversation], tokens: Tokens
) -> Iterator[tuple[Ints, Ints] | CannotRender]:
    tokenizer = tokens.tokenizer
    texts = render_all(conversations, tokenizer)
    found = _answer_spans(conversations, texts, tokenizer)
    pairs = [(text, spans) for text, spans in zip(texts, found, strict=True) if isinstance(text, str) and spans]
    wholes = iter(_wholes(pairs, tokens) if tokenizer.is_fast else [None] * len(pairs))
    for text, spans in zip(texts, found, strict=True):
        if isinstance(text, CannotRender):
            yield text
        elif not spans:
            yield CannotRender("the model's chat format changes the answers so that they cannot be found again")
        else:
            yield next(wholes) or _in_pieces(text, spans, tokenizer)


def _in_pieces(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[Ints, Ints]:
    ids: list[int] = []
    labels: list[int] = []
    for piece, spoken in _pieces(text, spans):
        tokens = list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        ids += tokens
        labels += tokens if spoken else [IGNORED] * len(tokens)
    return np.array(ids, np.int32), np.array(labels, np.int32)


def _apply(messages: Conversation | Sequence[Conversation], tokenizer: Any, asking: bool) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking, **_FIXED)


def _answer_spans(
    conversations: Sequence[Conversation], texts: Sequence[str | CannotRender], tokenizer: Any
) -> list[list[Span]]:
    """Where the assistant speaks in each text, in characters: from behind the generation prompt to the end mark."""
    speaking = [
        [place for place, turn in enumerate(messages) if turn["role"] == "assistant" and turn["content"].strip()]
        if isinstance(text, str)
        else []
        for messages, text in zip(conversations, texts, strict=True)
    ]
    asked = [(number, place) for number, places in enumerate(speaking) for place in places]
    before = render_all([conversations[number][:place] for number, place in asked], tokenizer, asking=True)
    ended = [place + 1 == len(conversations[number]) for number, place in asked]  # then the text itself ends there
    cut = [conversations[number][: place + 1] for (number, place), whole in zip(asked, ended, strict=True) if not whole]
    rest = iter(render_all(cut, tokenizer))
    spans: list[list[Span]] = [[] for _ in conversations]
    for (number, place), start, whole in zip(asked, before, ended, strict=True):
        text = texts[number]
        after = text if whole else next(rest)
        assert isinstance(text, str)
        span = _span(conversations[number], place, text, start, after)
        if span is not None and (not spans[number] or span[0] >= spans[number][-1][1]):
            spans[number].append(span)
    return spans


def _span(
    messages: Conversation, place: int, text: str, before: str | CannotRender, after: str | CannotRender
) -> Span | None:
    content = messages[place]["content"].strip()
    if (
        isinstance(before, str)  # a template may refuse a conversation that begins with an answer
        and isinstance(after, str)
        and before
        and text.startswith(before)
        and text.startswith(after)
        and content in after[len(before) :]
    ):
        said = after[len(before) :]
        end = said.rstrip()
        # Without an end mark, the white space behind the answer is the only sign that it is over.
        return len(before), len(before) + len(said if end.endswith(content) else end)
    if place != max(n for n, turn in enumerate(messages) if turn["role"] == "assistant"):
        return None  # this template rewrites earlier turns: only the last answer can be trusted
    start = text.rfind(content)
    return (start, len(text.rstrip())) if start >= 0 else None


def _pieces(text: str, spans: Sequence[Span]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    done = 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [piece for piece in [*pieces, (text[done:], False)] if piece[0]]


def _wholes(pairs: Sequence[tuple[str, Sequence[Span]]], tokens: Tokens) -> list[tuple[Ints, Ints] | None]:
    """Each text tokenized at once; None where a token crosses a border, or the tokens before an answer are not those of the prompt alone."""
    texts = [text for text, _ in pairs]
    prompts = list(dict.fromkeys(text[:start] for text, spans in pairs for start, _ in spans))
    alone = tokens.rows(prompts, special=False)
    place = {prompt: number for number, prompt in enumerate(prompts)}
    found = []
    for (text, spans), (ids, offsets) in zip(pairs, with_offsets(texts, tokens.tokenizer), strict=True):
        labels = np.full(len(ids), IGNORED, np.int32)
        lefts, rights = offsets[:, 0], offsets[:, 1]
        good = True
        for start, end in spans:
            inside = np.flatnonzero((rights > start) & (lefts < end) & (rights > lefts))
            good = bool(len(inside)) and lefts[inside[0]] >= start and rights[inside[-1]] <= end
            good = good and np.array_equal(ids[: inside[0]], alone[place[text[:start]]])
            if not good:
                break
            labels[inside[0] : inside[-1] + 1] = ids[inside[0] : inside[-1] + 1]
        found.append((ids, labels) if good else None)
    return found
