"""Rows counted in whole columns: an Arrow batch becomes the numbers that a look at each of its rows would give.

What cannot be counted exactly like that raises `Unusual`, and whoever asked looks at those rows one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.io.lines import MAX_CELL_CHARS, MAX_DEPTH
from engine.io.shapes import SHAPES, SPEAKERS, shape_of, text_of
from engine.io.survey import LIST, PART, SPEAKER, TURN, Counted
from engine.io.survey import SPEAKERS as SPEAKER_CODES

_MAX_EXACT = 1 << 53  # whole numbers beyond it are not all floats
_MAX_LEFT_OUT = 5
_SPACE_STARTS = np.zeros(256, bool)  # bytes with which white space may begin, and end, in UTF-8
_SPACE_STARTS[:0x21] = True
_SPACE_STARTS[[0xC2, 0xE1, 0xE2, 0xE3]] = True
_SPACE_ENDS = np.zeros(256, bool)
_SPACE_ENDS[:0x21] = True
_SPACE_ENDS[[0x85, 0xA0, *range(0x80, 0x8B), 0xA8, 0xA9, 0xAF, 0x9F]] = True

Lines = Callable[[np.ndarray], np.ndarray]
"""Lines of the file in which the rows with these numbers begin."""


class Unusual(Exception):
    """These rows have to be looked at one by one."""


@dataclass(frozen=True)
class _Texts:
    """A column of texts without white space around them."""

    chars: np.ndarray  # (rows,) int64
    hashes: np.ndarray  # (rows,) uint64, of the texts in UTF-8
    filled: np.ndarray  # (rows,) bool


@dataclass(frozen=True)
class Prepared:
    """The part of the count that many processors can do at once: columns checked, white space found, characters counted."""

    batch: Any
    columns: dict[
        str, tuple[Any, np.ndarray, np.ndarray]
    ]  # column -> filled up texts, their characters, rows with white space around them


def countable(schema: Any, mapping: Mapping[str, str]) -> bool:
    """Whether columns of these types can be counted without looking at each row."""
    if len(set(schema.names)) < len(schema.names) or not all(_is_plain(field.type) for field in schema):
        return False
    for role, column in mapping.items():
        if column not in schema.names:
            return False
        kind = schema.field(column).type
        if role == "messages":
            if not _are_turns(kind):
                return False
        elif not _is_scalar(kind):
            return False
    return True


def _is_plain(kind: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a row reader would take every value of this type."""
    if _is_list(kind):
        return depth > 1 and _is_plain(kind.value_type, depth - 1)
    if pa.types.is_struct(kind):
        return depth > 1 and all(_is_plain(kind.field(at).type, depth - 1) for at in range(kind.num_fields))
    return _is_scalar(kind) or pa.types.is_null(kind)


def _is_scalar(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type)
    return _is_string(kind) or pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64(), pa.bool_())


def _is_string(kind: Any) -> bool:
    return kind in (pa.string(), pa.large_string())


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _are_turns(kind: Any) -> bool:
    """Whether a column holds conversations in one layout: who speaks and what is said stand under one name each."""
    if not (_is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    turn = kind.value_type
    names = [turn.field(at).name for at in range(turn.num_fields)]
    speaker, content = _turn_names(names)
    return bool(
        speaker and content and all(_is_string(turn.field(names.index(name)).type) for name in (speaker, content))
    )


def _turn_names(names: list[str]) -> tuple[str, str]:
    speakers = [name for name in ("role", "from", "speaker") if name in names]
    contents = [name for name in ("content", "value", "text") if name in names]
    return (speakers[0], contents[0]) if len(speakers) == len(contents) == 1 else ("", "")


def prepare(batch: Any, mapping: Mapping[str, str]) -> Prepared:
    """Check a record batch and do what needs no Python object."""
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if _is_string(column.type) and _bytes_of(column).max(initial=0) > MAX_CELL_CHARS:
            raise Unusual  # perhaps; whoever counts its characters knows
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
            if _bytes_of(column).max(initial=0) > MAX_CELL_CHARS:
                raise Unusual
        if name in mapping.values():
            if mapping.get("messages") == name:
                speaker, content = _turn_names([field.name for field in column.type.value_type])
                column = column.flatten()
                if column.null_count:
                    raise Unusual
                found[f"{name} speakers"] = (pc.struct_field(column, speaker), np.zeros(0), np.zeros(0))
                column, name = pc.struct_field(column, content), f"{name} contents"
            elif not _is_string(column.type):
                column = _as_text(column, mapping.get("label") == name)
            if column.null_count:
                column = pc.fill_null(column, "")
            found[name] = (column, pc.utf8_length(column).to_numpy(zero_copy_only=False), _edges(column))
    return Prepared(batch, found)


def _as_text(column: Any, repeats: bool) -> Any:
    """Numbers and truths as the texts that a row reader makes of them."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type) and (pc.max(pc.abs(column)).as_py() or 0) >= _MAX_EXACT:
        raise Unusual
    if repeats:
        coded = column.dictionary_encode()
        words = pa.array([text_of(value, 0, "") for value in coded.dictionary.to_pylist()], pa.string())
        return words.take(coded.indices)
    return pa.array([text_of(value, 0, "") for value in column.to_pylist()], pa.string())


def _layout(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where each text of a column begins (and the last one ends), and the bytes they lie in."""
    wide = column.type == pa.large_string()
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int64 if wide else np.int32)[column.offset : column.offset + len(column) + 1]
    return starts, np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)


def _bytes_of(column: Any) -> np.ndarray:
    if not len(column):
        return np.zeros(0, np.int64)
    return np.diff(_layout(column)[0])


def _edges(column: Any) -> np.ndarray:
    """Rows whose text may have white space around it, by its first and last byte."""
    if not len(column):
        return np.zeros(0, np.int64)
    starts, data = _layout(column)
    filled = np.flatnonzero(starts[1:] > starts[:-1])
    doubtful = _SPACE_STARTS[data[starts[filled]]] | _SPACE_ENDS[data[starts[filled + 1] - 1]]
    found: np.ndarray = filled[doubtful]
    return found


def count(batch: Any, mapping: Mapping[str, str], lines: Lines) -> Counted:
    """The numbers of a record batch; lines are counted from its first one."""
    prepared, num_rows = prepare(batch, mapping), batch.num_rows
    usable = np.full(num_rows, bool(mapping))
    lengths, keys = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.uint64)
    shape = SHAPES.get(shape_of(tuple(mapping)))
    needed = shape.roles if shape is not None else tuple(mapping)
    label = None
    for role, column in mapping.items():
        if role == "messages":
            found = _conversations(batch.column(column), prepared, column)
        elif role == "label":
            label = prepared.columns[column][0].dictionary_encode()
            words = [word.strip() for word in label.dictionary.to_pylist()]
            codes = label.indices.to_numpy()
            if role in needed:
                usable &= np.array([bool(word) for word in words], bool)[codes] if words else False
            continue
        else:
            found = _texts(*prepared.columns[column])
        if role in needed:
            usable &= found.filled
        lengths += found.chars
        keys = keys * np.uint64(PART) + found.hashes
    chosen = np.flatnonzero(usable)
    missing = np.flatnonzero(~usable)[:_MAX_LEFT_OUT]
    return Counted(
        num_rows=num_rows,
        lengths=lengths[chosen].astype(np.uint32),
        keys=keys[chosen],
        left_out=tuple(lines(missing).tolist()),
        labels=() if label is None else _labels(words, codes, chosen, lines),
    )


def _labels(words: list[str], codes: np.ndarray, chosen: np.ndarray, lines: Lines) -> tuple[tuple[str, int, int], ...]:
    found, first, counts = np.unique(codes[chosen], return_index=True, return_counts=True)
    order = np.argsort(first)
    places = lines(chosen[first[order]])
    return tuple(
        (words[code], count, line)
        for code, count, line in zip(found[order].tolist(), counts[order].tolist(), places.tolist(), strict=True)
    )


def _texts(column: Any, chars: np.ndarray, edges: np.ndarray) -> _Texts:
    objects = column.cast(pa.large_binary() if column.type == pa.large_string() else pa.binary()).to_numpy(zero_copy_only=False)  # fmt: skip
    chars = chars.astype(np.int64)
    for place in edges.tolist():
        whole = objects[place].decode()
        text = whole.strip()
        if len(text) < len(whole):
            objects[place], chars[place] = text.encode(), len(text)
    return _Texts(chars, _hashes(objects), chars > 0)


def _hashes(objects: np.ndarray) -> np.ndarray:
    return np.fromiter(map(hash, objects), np.int64, len(objects)).view(np.uint64)


def _conversations(column: Any, prepared: Prepared, name: str) -> _Texts:
    """Conversations: their characters, the hash of who says what, and whether an assistant says anything."""
    num_turns = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(num_turns)
    starts = ends - num_turns
    total = int(ends[-1]) if len(ends) else 0
    coded = prepared.columns[f"{name} speakers"][0].dictionary_encode()
    roles = [SPEAKERS.get(str(word).lower()) for word in coded.dictionary.to_pylist()]
    if coded.null_count or None in roles:
        raise Unusual
    table = np.array([SPEAKER_CODES[role] for role in roles if role], np.uint64)
    speakers = table[coded.indices.to_numpy()] if total else np.zeros(0, np.uint64)
    contents, chars, edges = prepared.columns[f"{name} contents"]
    objects = contents.cast(pa.large_binary() if contents.type == pa.large_string() else pa.binary()).to_numpy(zero_copy_only=False)  # fmt: skip
    says = (speakers == SPEAKER_CODES["assistant"]) & (chars > 0)
    for place in edges[says[edges]].tolist():
        says[place] = bool(objects[place].strip()) and bool(objects[place].decode().strip())
    places = np.arange(total) - np.repeat(starts, num_turns)
    weights = (2 * places + 1).astype(np.uint64) * np.uint64(TURN)
    turns = (_hashes(objects) + np.uint64(SPEAKER) * speakers) * weights
    return _Texts(
        _sums(chars.astype(np.int64), starts, ends),
        _sums(turns, starts, ends) + np.uint64(LIST),
        _sums(says.astype(np.int64), starts, ends) > 0,
    )


def _sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums over stretches, which wrap around like the running sum they are differences of."""
    running = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])
    found: np.ndarray = running[ends] - running[starts]
    return found
