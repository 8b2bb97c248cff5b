"""Shapes of data: which column plays which role, guessed from names and content, and rows turned from columns to roles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.errors import EngineError
from engine.io.lines import at_line

MAX_LABELS = 1000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a row of data consists of."""

    name: str
    title: str
    roles: tuple[str, ...]
    optional: tuple[str, ...] = ()


# In the order in which a set of roles is tried: the first shape whose roles are all there wins.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="preferences",
            title="Better and worse answers",
            roles=("prompt", "chosen", "rejected"),
            optional=("prefix", "open"),
        ),
        Shape(name="messages", title="Conversations", roles=("messages",)),
        Shape(
            name="problems",
            title="Problems with checkable answers",
            roles=("question", "answer"),
            optional=("hint", "solution"),
        ),
        Shape(
            name="instruction",
            title="Requests and answers",
            roles=("instruction", "output"),
            optional=("input", "system"),
        ),
        Shape(name="classification", title="Texts with a topic", roles=("text", "label")),
        Shape(name="text", title="Plain texts", roles=("text",)),
    )
}
_MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_ASK = ("instruction", "prompt", "question", "query", "request", "user", "human", "problem", "input")
_ANSWER = ("output", "completion", "answer", "response", "reply", "assistant", "solution", "target")
_FINAL = ("final_answer", "ground_truth", "correct_answer", "gold_answer")  # names that only a checkable answer has
_HINT = ("hint", "hints", "guidance")
_LABEL = (
    "label", "labels", "class", "category", "topic", "intent", "sentiment", "target", "tag", "rating", "stars", "kind", "type", "emotion",
    "language",
)  # fmt: skip
_TEXT = (
    "text",
    "message",
    "sentence",
    "content",
    "document",
    "body",
    "review",
    "utterance",
    "title",
    "comment",
    "story",
    "question",
    "tweet",
)
SPEAKERS = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user", "customer": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant", "ai": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


def shape_of(roles: Sequence[str]) -> str:
    """The shape that a set of roles makes, or "unknown"."""
    return next((shape.name for shape in SHAPES.values() if set(shape.roles) <= set(roles)), "unknown")


def guess_shape(columns: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """The likely shape of a table and which column plays which role, from its columns and a few rows."""
    names = {column.strip().lower().replace(" ", "_"): column for column in reversed(columns)}
    if {"chosen", "rejected"} <= names.keys():
        prompt = next((names[name] for name in _ASK if name in names), None)
        if prompt is not None:
            fragments = {role: names[role] for role in SHAPES["preferences"].optional if role in names}
            return "preferences", {
                "prompt": prompt,
                "chosen": names["chosen"],
                "rejected": names["rejected"],
                **fragments,
            }
    for column in [names[name] for name in _MESSAGES if name in names] or list(columns):
        if _holds_messages(column, sample):
            return "messages", {"messages": column}
    strings = [column for column in columns if _is_text(column, sample)]
    ask = next((names[name] for name in _ASK if names.get(name) in strings), None)
    if ask is not None:
        problems = _guess_problems(names, strings, ask, sample)
        if problems:
            return "problems", problems
    answer = next((names[name] for name in _ANSWER if names.get(name) in strings and names[name] != ask), None)
    if ask is not None and answer is not None and not (names.get("target") == answer and _few_values(answer, sample)):
        mapping = {"instruction": ask, "output": answer}
        extra = next((names[name] for name in ("input", "context") if names.get(name) in strings), None)
        if extra is not None and extra not in mapping.values():
            mapping["input"] = extra
        if names.get("system") in strings:
            mapping["system"] = names["system"]
        return "instruction", mapping
    return _guess_texts(columns, names, strings, sample)


def _guess_problems(
    names: Mapping[str, str], strings: Sequence[str], ask: str, sample: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Roles of a table of problems, or nothing. Plain questions and answers stay requests: those goals that check answers take them as well."""
    hint = next((names[name] for name in _HINT if name in names and _is_scalar(names[name], sample)), None)
    final = next((names[name] for name in _FINAL if name in names and _is_scalar(names[name], sample)), None)
    plain = next((names[name] for name in ("answer", "target") if name in names and names[name] != ask), None)
    if final is None and plain is not None and _is_scalar(plain, sample):
        number = plain not in strings and names.get("answer") == plain and not _few_values(plain, sample)
        if hint is not None or number:
            final = plain
    if final is None:
        return {}
    mapping = {"question": ask, "answer": final}
    if hint is not None:
        mapping["hint"] = hint
    solution = next(
        (names[name] for name in ("solution", "rationale", "answer", "output") if names.get(name) in strings), None
    )
    if solution is not None and solution not in mapping.values():
        mapping["solution"] = solution
    return mapping


def _guess_texts(
    columns: Sequence[str], names: Mapping[str, str], strings: Sequence[str], sample: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[str, str]]:
    label = next((names[name] for name in _LABEL if name in names and _few_values(names[name], sample)), None)
    others = [column for column in strings if column != label]
    text = next((names[name] for name in _TEXT if names.get(name) in others), None)
    if text is None and others:
        text = max(others, key=lambda column: _mean_length(column, sample))
    if text is None:
        return "unknown", {}
    if label is None:
        few = [column for column in columns if column != text and _few_values(column, sample)]
        few = [column for column in few if _mean_length(column, sample) < _mean_length(text, sample)]
        label = min(few, key=lambda column: len({str(row.get(column)) for row in sample}), default=None)
    if label is None:
        return "text", {"text": text}
    return "classification", {"text": text, "label": label}


def row_in_roles(raw: Mapping[str, Any], mapping: Mapping[str, str], line: int) -> dict[str, Any] | None:
    """One row as role -> value; None when it says too little to learn from, a fault when it cannot be understood."""
    row: dict[str, Any] = {}
    for role, column in mapping.items():
        value = raw.get(column)
        if role == "messages":
            row[role] = messages_of(value, line, column)
        elif role in {"prompt", "chosen", "rejected"} and isinstance(value, list):
            said = messages_of(value, line, column)
            row[role] = said if role == "prompt" else said[-1]["content"] if said else ""
        else:
            row[role] = text_of(value, line, column)
    shape = SHAPES.get(shape_of(tuple(mapping)))
    needed = shape.roles if shape is not None else tuple(mapping)
    if any(not row[role] for role in needed):
        return None
    if "messages" in row and not any(
        turn["role"] == "assistant" and turn["content"].strip() for turn in row["messages"]
    ):
        return None
    return row


def messages_of(value: Any, line: int, column: str) -> list[dict[str, str]]:
    """A conversation in the common layouts, as a list of {"role", "content"}."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _not_messages(line, column, "its text is not valid JSON") from None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise _not_messages(line, column, f"it holds a {_kind(value)}")
    turns: list[dict[str, str]] = []
    for turn in value:
        if not isinstance(turn, dict):
            raise _not_messages(line, column, f"one turn is a {_kind(turn)}")
        speaker = turn.get("role", turn.get("from", turn.get("speaker")))
        content = turn.get("content", turn.get("value", turn.get("text")))
        role = SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise _not_messages(line, column, f"nobody knows the speaker '{str(speaker)[:40]}'")
        if isinstance(content, list):
            content = "".join(
                part.get("text", "") for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
        if content is not None and not isinstance(content, str):
            raise _not_messages(line, column, f"what one turn says is a {_kind(content)}")
        turns.append({"role": role, "content": content or ""})
    return turns


def _not_messages(line: int, column: str, reason: str) -> EngineError:
    return EngineError(
        at_line(
            line,
            f"the column '{column}' is not a conversation.",
            f"Here {reason}.",
            'A conversation is a list like [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].',
            "not_messages",
        )
    )


def text_of(value: Any, line: int, column: str) -> str:
    """A cell as the text that plays a role; an EngineError for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise EngineError(
            at_line(
                line,
                f"the column '{column}' holds a {_kind(value)}, not a text.",
                "Only texts and numbers can play this role.",
                "Choose another column, or export this one as text.",
                "not_text",
            )
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a label 1.0 that a spreadsheet made of 1
    return str(value).strip()


def _kind(value: Any) -> str:
    names = {
        dict: "object",
        list: "list",
        str: "text",
        bool: "yes/no value",
        int: "number",
        float: "number",
        type(None): "missing value",
    }
    return names.get(type(value), type(value).__name__)


def _holds_messages(column: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether at least half of the filled cells are conversations: a damaged row must not hide what the column is."""
    values = [row[column] for row in sample if row.get(column)][:20]
    good = 0
    for value in values:
        try:
            good += bool(messages_of(value, 0, column))
        except EngineError:
            continue
    return 2 * good >= len(values) and good > 0


def _is_text(column: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    values = [row[column] for row in sample if row.get(column) not in (None, "")]
    texts = [value for value in values if isinstance(value, str)]
    return bool(texts) and 2 * len(texts) >= len(values) and not all(_is_number(text) for text in texts)


def _is_scalar(column: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every filled cell is a text or a number."""
    values = [row[column] for row in sample if row.get(column) not in (None, "")]
    return bool(values) and all(isinstance(value, str | int | float) for value in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _few_values(column: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column looks like names of classes: short, and repeated (or the sample is tiny)."""
    values = [row.get(column) for row in sample if row.get(column) not in (None, "")]
    if not values or any(isinstance(value, list | dict) for value in values):
        return False
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return False
    texts = [str(value) for value in values]
    return max(map(len, texts)) <= 60 and (len(texts) < 8 or len(set(texts)) <= 0.6 * len(texts))


def _mean_length(column: str, sample: Sequence[Mapping[str, Any]]) -> float:
    return sum(len(str(row.get(column) or "")) for row in sample) / max(1, len(sample))
