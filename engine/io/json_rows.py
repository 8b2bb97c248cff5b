"""Rows of JSON: one object a line, or one list read element by element, never more than one element in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.core.errors import Fault
from engine.io.lines import (
    MAX_COLUMNS,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    TOP,
    Place,
    RawRow,
    Report,
    at_line,
    deeper_than,
    lines,
    long_line,
    not_utf8,
    too_deep,
)

_PIECE_BYTES = 1 << 20


def read_jsonl(path: Path, report: Report, start: Place = TOP) -> Iterator[RawRow]:
    """One object a line."""
    return objects_of(lines(path, report, start), report)


def objects_of(numbered: Iterable[tuple[int, str]], report: Report) -> Iterator[RawRow]:
    """The objects in lines of text, one in each."""
    for line, text in numbered:
        if not text.strip():
            continue
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            report(_json_fault(line, error))
            continue
        problem = _object_fault(line, value)
        if problem is not None:
            report(problem)
        else:
            yield line, value if isinstance(value, dict) else {"text": value}


def read_json(path: Path, report: Report, start: Place = TOP) -> Iterator[RawRow]:
    """A list of objects, however it is broken into lines; always read from the top."""
    text = _Text(path, report)
    if not text.blank_skipped():
        return
    if text.char != "[":
        report(
            at_line(
                text.line,
                "this file holds one object, not a list of rows.",
                "Each row of the list is one example.",
                "Save it as a list [ {…}, {…} ] or as JSONL with one object per line.",
                "not_a_list",
            )
        )
        return
    text.move(text.place + 1)
    first = True
    while True:
        if not text.blank_skipped():
            report(
                at_line(
                    text.line,
                    "the list never ends.",
                    "The closing ] is missing; the file was cut short.",
                    "Export the data again.",
                    "invalid_json",
                )
            )
            return
        if text.char == "]":
            text.move(text.place + 1)
            if text.blank_skipped():
                report(
                    at_line(
                        text.line,
                        "something stands behind the end of the list.",
                        "A JSON file holds one list.",
                        "Save the data as one list.",
                        "invalid_json",
                    )
                )
            return
        if not first:
            if text.char != ",":
                report(
                    at_line(
                        text.line,
                        "a comma is missing between two rows.",
                        "Rows of a list are separated by commas.",
                        "Export the data again.",
                        "invalid_json",
                    )
                )
                return
            text.move(text.place + 1)
            text.blank_skipped()
        first, line = False, text.line
        try:
            value = text.element()
        except (ValueError, RecursionError) as error:
            report(_json_fault(line, error, text))
            return
        problem = _object_fault(line, value)
        if problem is not None:
            report(problem)
        else:
            yield line, value if isinstance(value, dict) else {"text": value}


class _Text:
    """A window on a long text that knows its line."""

    def __init__(self, path: Path, report: Report) -> None:
        self._pieces = _pieces(path, report)
        self.buffer, self.place, self.line = "", 0, 1

    @property
    def char(self) -> str:
        return self.buffer[self.place]

    def more(self) -> bool:
        piece = next(self._pieces, "")
        if piece:
            self.buffer, self.place = self.buffer[self.place :] + piece, 0
        return bool(piece)

    def move(self, place: int) -> None:
        self.line += self.buffer.count("\n", self.place, place)
        self.place = place

    def blank_skipped(self) -> bool:
        """Move to the next character that is no white space; False at the end of the file."""
        while True:
            place = self.place
            while place < len(self.buffer) and self.buffer[place] in " \t\r\n":
                place += 1
            self.move(place)
            if place < len(self.buffer):
                return True
            if not self.more():
                return False

    def element(self) -> Any:
        """Decode the value that starts here, reading on while it is incomplete."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError:
                if len(self.buffer) - self.place > MAX_LINE_BYTES or not self.more():
                    raise
                continue
            self.move(end)
            return value


def _pieces(path: Path, report: Report) -> Iterator[str]:
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with path.open("rb") as file:
        while raw := file.read(_PIECE_BYTES):
            try:
                text = decoder.decode(raw)
            except UnicodeDecodeError as error:
                report(not_utf8(line + error.object.count(b"\n", 0, error.start), error))
                return
            line += text.count("\n")
            if text:
                yield text


class _Repeated(ValueError):
    """An object names a key twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in names if names.count(name) > 1))
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_constant)


def is_json(raw: bytes) -> bool:
    """Whether these bytes are one complete JSON value."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _json_fault(line: int, error: Exception, text: _Text | None = None) -> Fault:
    if isinstance(error, RecursionError):
        return too_deep(line)
    if isinstance(error, _Repeated):
        return at_line(
            line,
            f"the name '{error}' stands twice.",
            "Nobody could say which of the two is meant.",
            "Rename one of them.",
            "duplicate_columns",
        )
    detail = str(error)
    if isinstance(error, json.JSONDecodeError):
        if text is not None:
            if len(text.buffer) - text.place > MAX_LINE_BYTES and (
                error.msg.startswith("Unterminated") or error.pos > len(text.buffer) - 16
            ):
                return long_line(line)
            line += text.buffer.count("\n", text.place, error.pos)
        detail = f"{error.msg[0].lower()}{error.msg[1:]} at character {error.colno}"
    return at_line(
        line,
        "this is not valid JSON.",
        f"The reader says: {detail[:200]}.",
        "Correct this line or export the data again.",
        "invalid_json",
    )


def _object_fault(line: int, value: Any) -> Fault | None:
    if isinstance(value, str):
        return None  # a list of plain texts
    if not isinstance(value, dict):
        return at_line(
            line,
            "this row is not an object.",
            'Every row must look like {"text": "…", "label": "…"}.',
            "Export the data with one object per row.",
            "not_an_object",
        )
    if len(value) > MAX_COLUMNS:
        return at_line(
            line,
            f"it has {len(value):,} columns.",
            f"At most {MAX_COLUMNS} are read.",
            "Keep the columns that matter.",
            "too_many_columns",
        )
    return too_deep(line) if deeper_than(value, MAX_DEPTH) else None
