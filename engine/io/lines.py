"""Lines of a text file, bounded and numbered, and the faults that every reader shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.core.errors import Fault

MAX_CELL_CHARS = 1_000_000
MAX_LINE_BYTES = 4_000_000
MAX_COLUMNS = 512
MAX_DEPTH = 20
UTF8_MARK = b"\xef\xbb\xbf"
SAVE_AS_TABLE = "Save the table as CSV, TSV, JSON, JSONL or Parquet and send that file."

Report = Callable[[Fault], None]
RawRow = tuple[int, dict[str, Any]]  # line number (row number in Parquet), column -> value


@dataclass(frozen=True)
class Place:
    """Where a row begins: how many bytes lie before it, in which line, and for a table in text the columns that were named above."""

    byte: int = 0
    line: int = 1
    header: tuple[str, ...] | None = None


TOP = Place()


def lines(path: Path, report: Report, start: Place = TOP) -> Iterator[tuple[int, str]]:
    """Physical lines as text; stops after a line that cannot be read."""
    with path.open("rb") as file:
        file.seek(start.byte)
        yield from numbered(file, report, start.line)


def numbered(file: BinaryIO, report: Report, first: int = 1) -> Iterator[tuple[int, str]]:
    """The lines of an open file as text, the next of which has the number `first`; stops after a line that cannot be read."""
    number = first - 1
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(UTF8_MARK)
        if len(raw) > MAX_LINE_BYTES:
            report(long_line(number))
            return
        if b"\x00" in raw:
            report(
                at_line(
                    number,
                    "it holds a zero byte.",
                    "Text never does; the file is binary or damaged.",
                    SAVE_AS_TABLE,
                    "wrong_file",
                )
            )
            return
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            report(not_utf8(number, error))
            return
        yield number, text


def file_fault(what: str, why: str, way_out: str, code: str) -> Fault:
    """A fault of the whole file."""
    return Fault(where="file", what=what, why=why, way_out=way_out, code=code)


def at_line(line: int, what: str, why: str, way_out: str, code: str) -> Fault:
    """A fault of one line; the sentence names the line too, because it is often shown alone."""
    return Fault(where=f"line {line}", what=f"Line {line:,}: {what}", why=why, way_out=way_out, code=code)


def not_utf8(line: int, error: UnicodeDecodeError) -> Fault:
    """A byte that no UTF-8 text holds."""
    return at_line(
        line,
        f"the byte {error.object[error.start]:#04x} is not UTF-8 text.",
        "The file was saved in another encoding, such as Windows-1252.",
        "Save it again with the encoding UTF-8.",
        "not_utf8",
    )


def long_line(line: int) -> Fault:
    """A line beyond the limit."""
    return at_line(
        line,
        f"it is longer than {MAX_LINE_BYTES / 1e6:g} MB.",
        "One row that long is nearly always a fault of the export.",
        "Save the file again with one row per line.",
        "long_line",
    )


def long_cell(line: int, column: str) -> Fault:
    """A cell beyond the limit; without a column it is the one that starts in this line."""
    name = f"the cell '{column}'" if column else "a cell that starts here"
    return at_line(
        line,
        f"{name} is longer than {MAX_CELL_CHARS:,} characters.",
        "A model reads a few thousand words at most; often a quotation mark is missing.",
        "Correct or split this row.",
        "long_cell",
    )


def too_deep(line: int) -> Fault:
    """Lists and objects inside each other without end."""
    return at_line(
        line,
        f"values lie more than {MAX_DEPTH} levels inside each other.",
        "Training data is flat, or a list of messages.",
        "Export the data with one simple object per row.",
        "too_deep",
    )


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects lie inside each other more than `levels` deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(deeper_than(item, levels - 1) for item in inner)
