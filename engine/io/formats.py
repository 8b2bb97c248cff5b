"""File formats: find out what a file is from its first bytes, and read its rows one at a time with line numbers.

Nothing here trusts the file: lines, cells, columns and nesting are bounded, and whatever is wrong is said with its line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.core.errors import EngineError, Fault
from engine.io.json_rows import is_json, read_json, read_jsonl
from engine.io.lines import (
    MAX_CELL_CHARS,
    MAX_COLUMNS,
    MAX_DEPTH,
    SAVE_AS_TABLE,
    TOP,
    UTF8_MARK,
    Place,
    RawRow,
    Report,
    at_line,
    deeper_than,
    file_fault,
    lines,
    long_cell,
    too_deep,
)

MAX_FILE_BYTES = 4 << 30
MAX_PARAGRAPH_CHARS = 16_000
SAMPLE_BYTES = 1 << 16
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive or an Excel or Word file"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GIF8", "an image"),
    (b"II*\x00", "an image"),
    (b"MM\x00*", "an image"),
    (b"RIFF", "an image, a sound or a film"),
    (b"OggS", "a sound"),
    (b"fLaC", "a sound"),
    (b"%PDF", "a PDF document"),
    (b"{\\rtf", "a word processor document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"GGUF", "a model in the GGUF format"),
)


def refuse_at_once(problem: Fault) -> None:
    """The report that stops at the first fault."""
    raise EngineError(problem)


def sniff_format(path: Path, filename: str = "") -> str:
    """What kind of table a file is, from its content first and its name second; anything else is refused in a sentence."""
    with path.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
    if not head.removeprefix(UTF8_MARK).strip():
        raise EngineError(
            file_fault(
                "This file is empty.", "It holds no row.", "Save the table again and send the new file.", "empty_file"
            )
        )
    if head.startswith(b"PAR1"):
        return "parquet"
    _refuse_foreign(head)
    ending = (filename or path.name).lower().rpartition(".")[2]
    start = head.removeprefix(UTF8_MARK).lstrip()
    if ending in {"csv", "tsv"}:
        return ending
    if start.startswith(b"["):
        return "json"
    if start.startswith(b"{"):
        first, _, rest = start.partition(b"\n")
        several = ending == "jsonl" or rest.lstrip().startswith(b"{") or is_json(first)
        return "jsonl" if several else "json"
    if ending in {"json", "jsonl"}:
        raise EngineError(
            at_line(
                1,
                f"this file is called .{ending} and does not hold JSON.",
                "JSON data starts with { or [.",
                "Save it again as JSON, or give it the right ending.",
                "invalid_json",
            )
        )
    if ending == "parquet":
        raise EngineError(
            file_fault(
                "This file is called .parquet and is not one.", "Its first bytes differ.", SAVE_AS_TABLE, "wrong_file"
            )
        )
    if ending == "txt":
        return "txt"
    delimiter, columns = _best_delimiter(head.decode("utf-8", errors="replace"))
    return "txt" if columns < 2 else "tsv" if delimiter == "\t" else "csv"


def read_raw(
    path: Path, kind: str, report: Report = refuse_at_once, *, max_bytes: int = MAX_FILE_BYTES, start: Place = TOP
) -> Iterator[RawRow]:
    """Yield (line, column -> value) from a file of a known format; faults go to `report`, which raises or takes note.

    start: of JSONL and of tables in text only what follows this place.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise EngineError(
            file_fault(
                f"This file has {size / 1e6:,.0f} MB.",
                f"Files may have at most {max_bytes / 1e6:,.0f} MB here.",
                "Send a part of the rows.",
                "too_large",
            )
        )
    yield from with_short_cells(_READERS[kind](path, report, start), report)


def with_short_cells(rows: Iterable[RawRow], report: Report) -> Iterator[RawRow]:
    """The rows none of whose cells is longer than anyone reads; the others are reported."""
    for line, row in rows:
        long = next((name for name, cell in row.items() if isinstance(cell, str) and len(cell) > MAX_CELL_CHARS), None)
        if long is not None:
            report(long_cell(line, long))
        else:
            yield line, row


def delimiter_of(path: Path) -> str:
    """The separator of a table in text."""
    with path.open("rb") as file:
        sample = file.read(SAMPLE_BYTES).removeprefix(UTF8_MARK).decode("utf-8", errors="replace")
    return _best_delimiter(sample)[0]


def behind_header(path: Path) -> Place:
    """Where the first row of a table in text begins; its header must be in order."""
    spans: list[int] = []

    def texts() -> Iterator[str]:
        for _, text in lines(path, refuse_at_once):
            spans.append(len(text.encode()))
            yield text

    with path.open("rb") as file:
        mark = UTF8_MARK if file.read(len(UTF8_MARK)) == UTF8_MARK else b""
    reader = csv.reader(texts(), delimiter=delimiter_of(path), strict=True)
    record = next(record for record in reader if record and (len(record) > 1 or record[0].strip()))
    header = _header(record, reader.line_num)
    return Place(byte=len(mark) + sum(spans), line=reader.line_num + 1, header=tuple(header))


def _read_csv(path: Path, report: Report, start: Place = TOP) -> Iterator[RawRow]:
    delimiter = delimiter_of(path)
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.reader((text for _, text in lines(path, report, start)), delimiter=delimiter, strict=True)
    header = list(start.header) if start.header is not None else None
    while True:
        line = reader.line_num + start.line
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report(_csv_fault(line, str(error)))
            return
        if not record or (len(record) == 1 and not record[0].strip()):
            continue
        if header is None:
            header = _header(record, line)
        elif len(record) != len(header):
            report(
                at_line(
                    line,
                    f"it has {len(record)} cells and the header has {len(header)}.",
                    "A cell that contains the separator must stand in quotation marks.",
                    "Correct this line or export the table again.",
                    "ragged_line",
                )
            )
        else:
            yield line, dict(zip(header, record, strict=True))


def _header(record: list[str], line: int) -> list[str]:
    if len(record) > MAX_COLUMNS:
        raise EngineError(
            at_line(
                line,
                f"it names {len(record):,} columns.",
                f"At most {MAX_COLUMNS} are read.",
                "Keep the columns that matter, usually a text and a label.",
                "too_many_columns",
            )
        )
    names = [name.strip() or f"column {place}" for place, name in enumerate(record, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EngineError(
            at_line(
                line,
                f"the column '{twice[0]}' stands twice in the header.",
                "Nobody could say which of the two is meant.",
                "Rename one of them.",
                "duplicate_columns",
            )
        )
    return names


def _csv_fault(line: int, reason: str) -> Fault:
    if "field larger" in reason:
        return long_cell(line, "")
    if "unexpected end" in reason:
        return at_line(
            line,
            "a quotation mark opens here and never closes.",
            "Everything behind it would become one cell.",
            "Close it, or double the quotation marks inside the cell.",
            "open_quote",
        )
    return at_line(
        line,
        "the quotation marks or line ends are wrong.",
        "Text goes on behind a closing quotation mark, or a line ends halfway.",
        "Double the quotation marks inside a cell, or export the table again.",
        "bad_quote",
    )


def _best_delimiter(text: str) -> tuple[str, int]:
    """The separator that cuts the first records most often into as many cells as the header, and that number."""
    complete = text[: text.rfind("\n") + 1] or text
    best: tuple[float, int, str] = (0.0, 1, ",")
    csv.field_size_limit(MAX_CELL_CHARS)
    for delimiter in (",", "\t", ";", "|"):
        widths: list[int] = []
        try:
            for record in csv.reader(complete.splitlines(keepends=True), delimiter=delimiter):
                if record:
                    widths.append(len(record))
                if len(widths) >= 40:
                    break
        except csv.Error:
            continue
        agreement = sum(width == widths[0] for width in widths) / max(1, len(widths))
        if widths and widths[0] > 1 and agreement >= 0.5 and (agreement, widths[0]) > best[:2]:
            best = (agreement, widths[0], delimiter)
    return best[2], best[1]


def _read_text(path: Path, report: Report, start: Place = TOP) -> Iterator[RawRow]:
    """Paragraphs between blank lines; a very long one is cut at the end of a line."""
    gathered: list[str] = []
    first, size = 1, 0
    for number, text in lines(path, report, start):
        blank = not text.strip()
        if gathered and (blank or size + len(text) > MAX_PARAGRAPH_CHARS):
            yield first, {"text": "".join(gathered).strip()}
            gathered, size = [], 0
        if not blank:
            first = first if gathered else number
            gathered.append(text)
            size += len(text)
    if gathered:
        yield first, {"text": "".join(gathered).strip()}


def _read_parquet(path: Path, report: Report, start: Place = TOP) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            meta = file.metadata
            _header(list(file.schema_arrow.names), 1)
            widest = max((meta.row_group(place).total_byte_size for place in range(meta.num_row_groups)), default=0)
            if widest > MAX_FILE_BYTES:
                raise EngineError(
                    file_fault(
                        f"One block of this Parquet file unpacks to {widest / 1e9:,.1f} GB.",
                        "Blocks are read whole.",
                        "Write it with smaller row groups, or send a part of the rows.",
                        "too_large",
                    )
                )
            for batch in file.iter_batches(batch_size=256):
                yield from batch_rows(batch, number + 1, report)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise EngineError(
            file_fault(
                f"This Parquet file is damaged behind row {number:,}.",
                "Its data cannot be unpacked.",
                "Export the table again.",
                "damaged_file",
            )
        ) from error


def batch_rows(batch: Any, first: int, report: Report) -> Iterator[RawRow]:
    """The rows of an Arrow batch, the first of which has the number `first`."""
    for number, row in enumerate(batch.to_pylist(), start=first):
        problem = _made_plain(row, number)
        if problem is not None:
            report(problem)
        else:
            yield number, row


def _made_plain(row: dict[str, Any], number: int) -> Fault | None:
    """Turn dates and the like into text, in place; bytes are refused."""
    for name, value in row.items():
        if isinstance(value, bytes):
            return at_line(
                number,
                f"the column '{name}' holds binary data.",
                "Only text and numbers can be learned from here.",
                "Leave this column out of the file.",
                "binary_cell",
            )
        if not (value is None or isinstance(value, str | int | float | bool | list | dict)):
            row[name] = str(value)
    return too_deep(number) if deeper_than(row, MAX_DEPTH) else None


_READERS = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": _read_parquet,
    "txt": _read_text,
}
FORMATS = tuple(_READERS)


def _refuse_foreign(head: bytes) -> None:
    kind = next((title for magic, title in _FOREIGN if head.startswith(magic)), None)
    lowered, way_out = head[:200].lstrip().lower(), SAVE_AS_TABLE
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "a Python pickle, which could run a program when opened"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind, way_out = "text in the encoding UTF-16", "Save it again with the encoding UTF-8."
    elif lowered.startswith((b"<!doctype html", b"<html", b"<?xml")):
        kind = "a web page or XML"
    elif kind is None and b"\x00" in head:
        kind = "a binary file"
    if kind is not None:
        raise EngineError(
            file_fault(f"This is {kind}, not a table.", "It cannot be read row by row.", way_out, "wrong_file")
        )
