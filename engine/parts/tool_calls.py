"""Tool calls as text: reading them without running anything, and comparing what was said with what was right."""

from __future__ import annotations

import ast
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_WORDS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True)
class Call:
    """One call: a name and its arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How an answer compares with the right one. `score` goes from -1 (nothing right, or no call that can be read) to 1 (all of it)."""

    exact: bool
    score: float
    readable: bool
    wrong_names: int = 0  # calls of a tool that was not wanted, or not called
    missing_parameters: int = 0
    unknown_parameters: int = 0
    wrong_values: int = 0


def calls_in(text: str) -> list[Call] | None:
    """The calls of an answer: f(a=1), [f(a=1), g()], or JSON {"name": …, "arguments": {…}}, alone or in a list; None when it is no call."""
    said = text.strip()
    for opening, closing in (("<tool_call>", "</tool_call>"), ("```json", "```"), ("```python", "```"), ("```", "```")):
        if said.startswith(opening) and said.endswith(closing) and len(said) >= len(opening) + len(closing):
            said = said[len(opening) : len(said) - len(closing)].strip()
    return _from_json(said) or _from_python(said)


def compare(gold: str, said: str) -> Comparison:
    """Names and arguments of two answers. Where the right answer is no call, any answer without a call is right."""
    wanted, given = calls_in(gold), calls_in(said)
    if wanted is None:
        return Comparison(exact=given is None, score=1.0 if given is None else -1.0, readable=True)
    if given is None:
        return Comparison(exact=False, score=-1.0, readable=False)
    left = list(given)
    right = pieces = wrong = missing = unknown = values = 0
    for call in wanted:
        pieces += 1 + len(call.arguments)
        match = min(
            (other for other in left if other.name == call.name), key=lambda other: _distance(call, other), default=None
        )
        if match is None:
            wrong += 1
            continue
        left.remove(match)
        right += 1
        missing += len(call.arguments.keys() - match.arguments.keys())
        extra = len(match.arguments.keys() - call.arguments.keys())
        unknown += extra
        pieces += extra
        for name in call.arguments.keys() & match.arguments.keys():
            same = _same(call.arguments[name], match.arguments[name])
            right += same
            values += not same
    wrong += len(left)
    pieces += sum(1 + len(call.arguments) for call in left)
    return Comparison(
        exact=right == pieces,
        score=2 * right / pieces - 1,
        readable=True,
        wrong_names=wrong,
        missing_parameters=missing,
        unknown_parameters=unknown,
        wrong_values=values,
    )


def overlap(one: str, other: str) -> float:
    """Shared words / words of the smaller of two texts, counted with repetition; 0 when either is empty."""
    first, second = Counter(one.lower().split()), Counter(other.lower().split())
    least = min(first.total(), second.total())
    return (first & second).total() / least if least else 0.0


def _distance(wanted: Call, given: Call) -> int:
    same = sum(
        name in given.arguments and _same(value, given.arguments[name]) for name, value in wanted.arguments.items()
    )
    return len(wanted.arguments) + len(given.arguments) - 2 * same


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().lower() == other.strip().lower()
    return bool(one == other)


def _from_json(text: str) -> list[Call] | None:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = []
    for item in body if isinstance(body, list) else [body]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        found.append(Call(item["name"], arguments))
    return found or None


def _from_python(text: str) -> list[Call] | None:
    """Calls written as in a program. The text is only parsed into a tree of literals; nothing is looked up or run."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    found = []
    for node in nodes:
        if not isinstance(node, ast.Call) or (node.args and not node.func):
            return None
        try:
            arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
            arguments |= {f"#{place}": _literal(value) for place, value in enumerate(node.args)}
        except ValueError:
            return None
        found.append(Call(ast.unparse(node.func), arguments))
    return found or None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in _WORDS:
        return _WORDS[node.id.lower()]
    return ast.literal_eval(node)
