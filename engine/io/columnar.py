"""Large regular files counted block by block in whole columns: JSONL, tables in text and Parquet.

Blocks are parsed by Arrow beside each other and taken in in their order. A block in which anything is unusual (a fault, a value of another type, white space
between rows) is not judged here: the row reader looks at it, and says what is wrong in its own words. What it says is what counts; this file only saves time.
"""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, json, parquet

from engine.core.errors import EngineError, Fault
from engine.io.batches import Unusual, count, countable
from engine.io.formats import batch_rows, behind_header, delimiter_of, read_raw, refuse_at_once, with_short_cells
from engine.io.json_rows import objects_of
from engine.io.lines import MAX_LINE_BYTES, TOP, UTF8_MARK, Place, RawRow, numbered
from engine.io.survey import SAMPLE_ROWS, Counted, Survey

BLOCK_BYTES = 2 << 20
BATCH_ROWS = 4096
_THREADS = 2
_AHEAD = 3  # blocks parsed before their turn: enough to keep two processors busy, few enough to bound memory
_MAX_UNUSUAL = 8  # blocks in a row; then the rest is read by rows
_LONGEST_NUMBER = 4300  # digits, beyond which Python reads no whole number
_NEWLINE, _QUOTE, _RETURN = 10, 34, 13

T = TypeVar("T")


class NotColumnar(Exception):
    """The file has to be read by rows from its first one, with a new survey."""


def survey_columns(path: Path, kind: str, survey: Survey) -> Place | None:
    """Count a file in columns as far as that is possible; where the row reader goes on, or None when everything was counted.

    NotColumnar is raised before anything reached the survey, or, in a damaged Parquet file, later: the row reader knows best how to say that.
    """
    try:
        head = list(islice(read_raw(path, kind, refuse_at_once), SAMPLE_ROWS))
    except (EngineError, ValueError):
        raise NotColumnar from None
    if len(head) < SAMPLE_ROWS:
        raise NotColumnar
    mapping = Survey(dict(survey.mapping) if survey.mapping is not None else None, refuse_at_once)
    mapping.know([raw for _, raw in head])
    return _SURVEYS[kind](path, survey, [raw for _, raw in head], mapping.mapping or {})


def _in_order(tasks: Iterable[tuple[Place, bytes, Callable[[], T]]]) -> Iterator[tuple[Place, bytes, Future[T]]]:
    """Run tasks beside each other and give them back in their order."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="look")
    waiting: deque[tuple[Place, bytes, Future[T]]] = deque()
    try:
        for place, block, task in tasks:
            waiting.append((place, block, pool.submit(task)))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


# ── JSONL ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _survey_jsonl(path: Path, survey: Survey, head: list[dict[str, Any]], mapping: Mapping[str, str]) -> Place | None:
    schema = _schema_of(head)
    if not countable(schema, mapping):
        raise NotColumnar
    survey.know(head)
    options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    floats = "double" in str(schema)

    def task(block: bytes) -> Callable[[], Counted]:
        return lambda: _count_objects(block, options, mapping, floats)

    line, unusual = 1, 0
    for place, block, counted in _in_order((place, block, task(block)) for place, block in _blocks_of_lines(path)):
        try:
            found = counted.result()
            survey.take(found, line - 1)
            line, unusual = line + found.num_rows, 0
        except (Unusual, pa.ArrowException):
            unusual += 1
            here = replace(place, line=line)
            rows = _rows_without_fault(block, line) if unusual <= _MAX_UNUSUAL else None
            if rows is None:
                return here
            for number, raw in rows:
                survey.see(number, raw)
            line += block.count(b"\n") + (not block.endswith(b"\n"))
    return None


def _schema_of(head: Iterable[Mapping[str, Any]]) -> Any:
    """The types of the columns of some rows; NotColumnar when one holds several."""
    names = dict.fromkeys(name for raw in head for name in raw)
    try:
        kinds = {name: pa.array([raw.get(name) for raw in head]).type for name in names}
    except (pa.ArrowException, OverflowError, UnicodeError):
        raise NotColumnar from None
    return pa.schema([(name, _filled(kind)) for name, kind in kinds.items()])


def _filled(kind: Any) -> Any:
    """A type in which text stands where no value was seen."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_filled(kind.value_type))
    if pa.types.is_struct(kind):
        fields = [kind.field(at) for at in range(kind.num_fields)]
        return pa.struct([(field.name, _filled(field.type)) for field in fields])
    return kind


def _blocks_of_lines(path: Path) -> Iterator[tuple[Place, bytes]]:
    """Pieces of a file that end with a line, or in a line that is too long to be read; their lines are not counted."""
    with path.open("rb") as file:
        at = 0
        while block := file.read(BLOCK_BYTES):
            block += file.readline(MAX_LINE_BYTES + 1)
            yield Place(at), block
            at += len(block)


def _count_objects(block: bytes, options: Any, mapping: Mapping[str, str], floats: bool) -> Counted:
    """Count a block of objects, exactly one of which stands in each line."""
    block = block.removeprefix(UTF8_MARK) if block.startswith(UTF8_MARK) else block
    if not block.endswith(b"\n"):
        block += b"\n"
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    tail = 2 if data[ends[0] - 1] == _RETURN else 1
    # Between "}" and "{" no object goes on, so as many objects as lines means one in each.
    whole = data[0] == ord("{") and (data[ends[:-1] + 1] == ord("{")).all() and (data[ends - tail] == ord("}")).all()
    longest = int(np.diff(ends, prepend=-1).max())
    if not whole or longest > MAX_LINE_BYTES or (tail == 2 and not (data[ends - 1] == _RETURN).all()):
        raise Unusual
    if floats and (b"NaN" in block or b"Inf" in block):
        raise Unusual  # Arrow takes them for numbers
    if floats and longest > _LONGEST_NUMBER and re.search(rb"[0-9]{4300}", block):
        raise Unusual
    reading = json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    table = json.read_json(pa.BufferReader(block), reading, options)
    if table.num_rows != len(ends):
        raise Unusual
    return _count_table(table, mapping)


def _count_table(
    table: Any, mapping: Mapping[str, str], lines: Callable[[np.ndarray], np.ndarray] | None = None
) -> Counted:
    (batch,) = table.combine_chunks().to_batches()
    batch.validate(full=True)  # a text that is no UTF-8
    return count(batch, mapping, lines or (lambda rows: rows + 1))


def _rows_without_fault(block: bytes, first: int) -> list[RawRow] | None:
    """The rows of a block, or None when the row reader has something to say about them."""
    faults: list[Fault] = []
    with io.BytesIO(block) as file:
        rows = list(with_short_cells(objects_of(numbered(file, faults.append, first), faults.append), faults.append))
    return None if faults else rows


# ── tables in text ────────────────────────────────────────────────────────────────────────────────────────────────────


def _survey_csv(path: Path, survey: Survey, head: list[dict[str, Any]], mapping: Mapping[str, str]) -> Place | None:
    start = behind_header(path)
    names = list(start.header or ())
    schema = pa.schema([(name, pa.string()) for name in names])
    if len(names) < 2 or not countable(schema, mapping):
        raise NotColumnar
    survey.know(head)
    delimiter = delimiter_of(path)
    options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    texts = csv.ConvertOptions(column_types=schema, strings_can_be_null=False)

    def task(block: bytes) -> Callable[[], tuple[Counted, int]]:
        return lambda: _count_records(block, names, options, texts, mapping)

    line = start.line
    for place, _, counted in _in_order((place, block, task(block)) for place, block in _blocks_of_records(path, start)):
        try:
            found, num_lines = counted.result()
        except (Unusual, pa.ArrowException):
            return replace(place, line=line, header=start.header)
        survey.take(found, line - 1)
        line += num_lines
    return None


def _blocks_of_records(path: Path, start: Place) -> Iterator[tuple[Place, bytes]]:
    """Pieces of a table that end with a record: at a line end before which quotation marks come in pairs."""
    with path.open("rb") as file:
        file.seek(start.byte)
        at = start.byte
        while block := file.read(BLOCK_BYTES):
            block += file.readline(MAX_LINE_BYTES + 1)
            inside = int(np.count_nonzero(np.frombuffer(block, np.uint8) == _QUOTE)) % 2
            while inside and len(block) < BLOCK_BYTES + MAX_LINE_BYTES and (more := file.readline(MAX_LINE_BYTES + 1)):
                block += more
                inside = (inside + more.count(b'"')) % 2
            yield Place(at), block
            at += len(block)


def _count_records(
    block: bytes, names: list[str], options: Any, texts: Any, mapping: Mapping[str, str]
) -> tuple[Counted, int]:
    """Count a block of records in which every quotation mark stands where it must; and its lines."""
    if not block.endswith(b"\n"):
        block += b"\n"
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    if b"\x00" in block or int(np.diff(ends, prepend=-1).max()) > MAX_LINE_BYTES:
        raise Unusual
    if b"\r" in block and np.count_nonzero(data == _RETURN) != np.count_nonzero(data[ends - 1] == _RETURN):
        raise Unusual
    if b'"' in block and not _well_quoted(data, ord(options.delimiter)):
        raise Unusual
    reading = csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names)
    table = csv.read_csv(pa.BufferReader(block), reading, options, texts)
    lines = None
    if table.num_rows != len(ends):
        breaks = np.zeros(table.num_rows, np.int64)
        for column in table.columns:
            breaks += pc.count_substring(column, "\n").to_numpy()
        starts = np.arange(table.num_rows) + np.cumsum(breaks) - breaks + 1
        if table.num_rows + int(breaks.sum()) != len(ends):
            raise Unusual  # empty lines

        def lines(rows: np.ndarray) -> np.ndarray:
            return starts[rows]

    return _count_table(table, mapping, lines), len(ends)


def _well_quoted(data: np.ndarray, delimiter: int) -> bool:
    """Whether marks open at the start of a cell, close at its end and stand twice inside, so that every reader sees the same cells."""
    marks = np.flatnonzero(data == _QUOTE)
    if len(marks) % 2:
        return False
    opening, closing = marks[::2], marks[1::2]
    twice = opening[1:] == closing[:-1] + 1
    before, after = data[opening - 1], data[closing + 1]  # the block ends with a line end
    starts = (before == delimiter) | (before == _NEWLINE)
    starts[0] |= opening[0] == 0
    starts[1:] |= twice
    stops = (after == delimiter) | (after == _NEWLINE) | (after == _RETURN)
    stops[:-1] |= twice
    return bool(starts.all() and stops.all())


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _survey_parquet(path: Path, survey: Survey, head: list[dict[str, Any]], mapping: Mapping[str, str]) -> Place | None:
    with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
        if not countable(file.schema_arrow, mapping):
            raise NotColumnar
        survey.know(head)
        number = 0
        batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=True)

        def task(batch: Any) -> Callable[[], tuple[Any, Counted | None]]:
            def run() -> tuple[Any, Counted | None]:
                try:
                    return batch, _count_table(pa.Table.from_batches([batch]), mapping)
                except (Unusual, pa.ArrowException):
                    return batch, None

            return run

        try:
            for _, _, counted in _in_order((TOP, b"", task(batch)) for batch in batches):
                batch, found = counted.result()
                if found is not None:
                    survey.take(found, number)
                else:
                    for line, raw in with_short_cells(batch_rows(batch, number + 1, survey.report), survey.report):
                        survey.see(line, raw)
                number += batch.num_rows
        except (pa.ArrowException, OSError):
            raise NotColumnar from None
    return None


_SURVEYS: dict[str, Callable[[Path, Survey, list[dict[str, Any]], Mapping[str, str]], Place | None]] = {
    "jsonl": _survey_jsonl,
    "csv": _survey_csv,
    "tsv": _survey_csv,
    "parquet": _survey_parquet,
}
KINDS = tuple(_SURVEYS)
