"""Encoded examples as a few flat arrays: five bytes a token where lists take forty, mapped from a file when they come from the cache."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from engine.tasks.base import Encoded, Example, Row

Ints = NDArray[np.int32]
Places = NDArray[np.int64]


class Ragged:
    """Rows of numbers of different lengths: row n is flat[starts[n] : starts[n + 1]]."""

    __slots__ = ("flat", "starts")

    def __init__(self, flat: Ints, starts: Places) -> None:
        self.flat, self.starts = flat, starts  # [N], [rows + 1]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | Ints]) -> Ragged:
        """Lay rows one behind another."""
        rows = list(rows)
        starts = starts_of(map(len, rows), len(rows))
        if rows and all(isinstance(row, np.ndarray) for row in rows):
            return cls(np.concatenate(rows).astype(np.int32, copy=False), starts)
        return cls(np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(starts[-1])), starts)

    @classmethod
    def joined(cls, pieces: Sequence[Ragged]) -> Ragged:
        """The rows of several, in their order."""
        lengths = np.concatenate([piece.lengths for piece in pieces]) if pieces else np.zeros(0, np.int64)
        flat = np.concatenate([piece.flat[piece.starts[0] : piece.starts[-1]] for piece in pieces]) if pieces else np.zeros(0, np.int32)  # fmt: skip
        return cls(flat, starts_of(lengths, len(lengths)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, place: int) -> Ints:
        return self.flat[self.starts[place] : self.starts[place + 1]]

    @property
    def lengths(self) -> Places:
        return np.diff(self.starts)

    def take(self, places: Places) -> Ragged:
        """The rows at these places, copied together."""
        return self._gathered(places, self.lengths[places])

    def cut(self, length: int) -> Ragged:
        """The first `length` numbers of every row."""
        lengths = self.lengths
        if not len(self) or int(lengths.max()) <= length:
            return self
        return self._gathered(np.arange(len(self)), np.minimum(lengths, length))

    def _gathered(self, places: Places, lengths: Places) -> Ragged:
        starts = starts_of(lengths, len(places))
        shift = np.repeat(self.starts[places] - starts[:-1], lengths)
        return Ragged(self.flat[shift + np.arange(int(starts[-1]))], starts)


def starts_of(lengths: Iterable[int] | Places, number: int) -> Places:
    """Where each of `number` rows begins, and where the last one ends."""
    starts = np.zeros(number + 1, np.int64)
    np.cumsum(
        lengths if isinstance(lengths, np.ndarray) else np.fromiter(lengths, np.int64, number),
        out=starts[1:],
    )
    return starts


class Examples(Sequence[Example]):
    """A sequence of examples that lie in flat arrays. An item is a plain example with lists of its own; a slice and `take` are views.

    `columns` maps each field of `kind` but the source to its numbers. Two fields may share one Ragged, as ids and labels of plain texts do.
    """

    __slots__ = ("_places", "columns", "kind", "sources")

    def __init__(
        self,
        columns: Mapping[str, Ragged],
        sources: Places,
        kind: type[Example] = Example,
        places: Places | None = None,
    ) -> None:
        self.columns, self.sources, self.kind = dict(columns), sources, kind
        self._places = np.arange(len(sources)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Examples: ...
    def __getitem__(self, place: int | slice) -> Example | Examples:
        if isinstance(place, slice):
            return Examples(self.columns, self.sources, self.kind, self._places[place])
        at = int(self._places[place])
        own = {name: column[at].tolist() for name, column in self.columns.items()}
        return self.kind(**own, source=int(self.sources[at]))

    def take(self, places: Sequence[int] | Places) -> Examples:
        """The examples at these places, as a view."""
        return Examples(self.columns, self.sources, self.kind, self._places[np.asarray(places, np.int64)])

    def rows(self, name: str) -> list[Ints]:
        """One field of every example, as views of the flat array."""
        column = self.columns[name]
        starts, ends, flat = column.starts[self._places], column.starts[self._places + 1], column.flat
        return [flat[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def own_sources(self) -> Places:
        """The row of the data that each example came from."""
        return self.sources[self._places]

    def lengths(self) -> list[int]:
        """`len` of every example."""
        found = [self.columns[name].lengths[self._places] for name in self.kind.measured]
        return [int(length) for length in np.maximum.reduce(found)] if len(self) else []

    def num_tokens(self) -> int:
        """Tokens of all examples, both sides of a pair counted."""
        return sum(int(self.columns[name].lengths[self._places].sum()) for name in self.kind.measured)

    def gathered(self) -> tuple[dict[str, Ragged], Places]:
        """Columns and sources of these examples alone, in their order; columns that are shared stay shared."""
        once = {id(column): column.take(self._places) for column in self.columns.values()}
        return {name: once[id(column)] for name, column in self.columns.items()}, self.own_sources()


def take(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """The examples at these places: a view where they lie in arrays."""
    return examples.take(places) if isinstance(examples, Examples) else [examples[place] for place in places]


def rows_of(examples: Sequence[Example], name: str) -> Sequence[Sequence[int] | Ints]:
    """One field of every example."""
    return examples.rows(name) if isinstance(examples, Examples) else [getattr(each, name) for each in examples]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """`len` of every example."""
    return examples.lengths() if isinstance(examples, Examples) else [len(each) for each in examples]


def sources_of(examples: Sequence[Example]) -> list[int]:
    """The row of the data that each example came from."""
    return examples.own_sources().tolist() if isinstance(examples, Examples) else [each.source for each in examples]


def fields_of(kind: type[Example]) -> tuple[str, ...]:
    """The fields of an example that hold numbers a token."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.name != "source")


class Picked(Sequence[Row]):
    """Some rows of a sequence, by number, read when they are asked for."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int] | Places) -> None:
        self.rows, self.places = rows, np.asarray(places, np.int64)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self.rows[at] for at in self.places[place].tolist()]
        return self.rows[int(self.places[place])]


def encoded_of(
    examples: Examples, train: Sequence[int], held: Sequence[int], rows: Sequence[Row], notes: list[str]
) -> Encoded:
    """The two sides of a split, with the rows that the held-out examples came from."""
    learned, aside = examples.take(train), examples.take(held)
    held_rows = Picked(rows, aside.own_sources())
    return Encoded(train=learned, holdout=aside, holdout_rows=held_rows, rows=rows, notes=notes, num_train_tokens=learned.num_tokens())  # fmt: skip
