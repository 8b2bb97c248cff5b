"""What is known of a data file so far: rows counted one by one or in whole columns, with the same facts and findings either way."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engine.core.errors import EngineError, Fault
from engine.io.lines import MAX_COLUMNS, Report
from engine.io.shapes import MAX_LABELS, guess_shape, row_in_roles, shape_of

if TYPE_CHECKING:
    import numpy as np

PREVIEW_ROWS = 20
SAMPLE_ROWS = 200
MAX_KEYS = 1_000_000  # texts that are remembered to notice when they come again
_MAX_LEFT_OUT = 5
_WAITING_KEYS = 65_536
_MANY = 100_000  # lengths beyond which sorting them in Python takes long
_MASK = (1 << 64) - 1
# Odd numbers without a pattern. The hashes that they spread are seeded anew in each process, so nobody can make texts that only seem to repeat.
PART, SPEAKER, TURN, LIST = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7, 0xDB4F0B9175AE2165
SPEAKERS = {"system": 1, "user": 2, "assistant": 3, "tool": 4}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something noticed in a file, as a whole sentence."""

    level: Literal["error", "warning", "note"]
    sentence: str
    code: str
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What some neighbouring rows hold, counted in whole columns."""

    num_rows: int
    lengths: np.ndarray  # uint32, of the usable rows
    keys: np.ndarray  # uint64, of the usable rows
    left_out: tuple[int, ...]  # lines of the first rows that cannot be used
    labels: tuple[
        tuple[str, int, int], ...
    ]  # label, how often, line of the first one; in the order in which they appear


class Survey:
    """Gathers the facts in one pass: a first few rows decide the roles, then every row is counted."""

    def __init__(self, mapping: dict[str, str] | None, report: Report) -> None:
        self.mapping = mapping
        self.report = report
        self.columns: dict[str, None] = {}
        self.preview: list[dict[str, Any]] = []
        self.num_raw = self.num_usable = self.num_left_out = 0
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._decided = False
        self._lengths = array("I")
        self._labels: Counter[str] = Counter()
        self._first_of_label: dict[str, int] = {}
        self._left_out: list[int] = []
        self._keys = _Keys()

    def see(self, line: int, raw: dict[str, Any]) -> None:
        """Take one row in."""
        self.num_raw += 1
        if len(self.columns) < MAX_COLUMNS:
            self.columns.update(dict.fromkeys(raw))
        if len(self.preview) < PREVIEW_ROWS:
            self.preview.append(raw)
        if self._decided:
            self._count(line, raw)
            return
        self._waiting.append((line, raw))
        if len(self._waiting) >= SAMPLE_ROWS:
            self._decide()

    def know(self, head: Sequence[dict[str, Any]]) -> None:
        """Decide the roles, columns and preview from the first rows; they are counted later, with all the others."""
        for raw in head:
            if len(self.columns) < MAX_COLUMNS:
                self.columns.update(dict.fromkeys(raw))
        self.preview = list(head[:PREVIEW_ROWS])
        if self.mapping is None:
            _, self.mapping = guess_shape(tuple(self.columns), head)
        self._decided = True

    def take(self, counted: Counted, before: int) -> None:
        """Take many rows in at once, whose columns are known and before which so many lines stand."""
        self.num_raw += counted.num_rows
        self.num_usable += len(counted.lengths)
        self.num_left_out += counted.num_rows - len(counted.lengths)
        self._left_out += [line + before for line in counted.left_out][: _MAX_LEFT_OUT - len(self._left_out)]
        self._lengths.frombytes(counted.lengths.tobytes())
        self._keys.add_many(counted.keys)
        for label, count, line in counted.labels:
            self._add_label(label, count, line + before)

    def _decide(self) -> None:
        self._decided = True
        if self.mapping is None:
            _, self.mapping = guess_shape(tuple(self.columns), [raw for _, raw in self._waiting])
        waiting, self._waiting = self._waiting, []
        for line, raw in waiting:
            self._count(line, raw)

    def _count(self, line: int, raw: dict[str, Any]) -> None:
        mapping = self.mapping or {}
        try:
            row = row_in_roles(raw, mapping, line) if mapping else None
        except EngineError as error:
            self.report(error.fault)
            return
        if row is None:
            self.num_left_out += 1
            if len(self._left_out) < _MAX_LEFT_OUT:
                self._left_out.append(line)
            return
        self.num_usable += 1
        label = row.get("label")
        if label is not None:
            self._add_label(label, 1, line)
        parts = [value for role, value in row.items() if role != "label"]
        self._lengths.append(sum(_chars(part) for part in parts))
        self._keys.add(_key_of(parts))

    def _add_label(self, label: str, count: int, line: int) -> None:
        if label in self._labels or len(self._labels) < MAX_LABELS:
            self._labels[label] += count
            self._first_of_label.setdefault(label, line)

    def finish(self) -> None:
        """Count what still waits, and report roles whose column is missing."""
        if not self._decided:
            self._decide()
        for role, column in (self.mapping or {}).items():
            if column not in self.columns and self.num_raw:
                self.report(no_column(role, column, tuple(self.columns)))

    def finish_quietly(self) -> None:
        """The same without another report: enough faults are known."""
        self.report = lambda problem: None
        self.finish()

    def facts(self) -> dict[str, Any]:
        """The counted part of the facts."""
        mapping = self.mapping or {}
        labels = sorted(self._labels)
        mean, p99, longest = _spread(self._lengths)
        return {
            "shape": shape_of(tuple(mapping)), "num_rows": self.num_usable if mapping else self.num_raw, "columns": tuple(self.columns),
            "mapping": dict(mapping), "labels": tuple(labels), "label_counts": tuple(self._labels[label] for label in labels),
            "mean_chars": mean, "p99_chars": p99, "max_chars": longest,
        }  # fmt: skip

    def findings(self) -> list[Finding]:
        """Warnings and notes; faults went to the report."""
        mapping, found = self.mapping or {}, []
        if not mapping and self.num_raw:
            found.append(Finding(level="warning", code="unknown_shape",
                                 sentence="Nobody can tell from the columns what is to be learned; say which column plays which role."))  # fmt: skip
        if mapping and self.num_left_out:
            first = self._left_out[0]
            verb = "row is" if self.num_left_out == 1 else "rows are"
            found.append(Finding(level="warning", code="rows_left_out", line=first,
                                 sentence=f"{self.num_left_out:,} {verb} left out because something is missing there, first in line {first:,}."))  # fmt: skip
        if "label" in mapping:
            found += self._label_findings()
        num_repeated = self._keys.num_repeated()
        if num_repeated and shape_of(tuple(mapping)) != "text":
            found.append(Finding(level="note", code="repeated_rows", sentence=f"{num_repeated:,} of {self.num_usable:,} rows repeat an earlier text; "
                                 "repeated texts can make the measured result look better than it is."))  # fmt: skip
        return found

    def _label_findings(self) -> list[Finding]:
        if len(self._labels) == 1:
            only = next(iter(self._labels))
            return [
                Finding(
                    level="warning",
                    code="one_class",
                    sentence=f"All rows have the same label, '{only}'; sorting needs at least two.",
                )
            ]
        if len(self._labels) >= MAX_LABELS:
            return [Finding(level="warning", code="too_many_classes",
                            sentence=f"The label column holds {MAX_LABELS:,} different values or more; it is probably not a label.")]  # fmt: skip
        single = sorted(label for label, count in self._labels.items() if count == 1)
        found = []
        if single:
            line = self._first_of_label[single[0]]
            names = ", ".join(f"'{label}'" for label in single[:5]) + (" and more" if len(single) > 5 else "")
            found.append(Finding(level="warning", code="rare_class", line=line,
                                 sentence=f"There is only one row with the label {names}; it can be learned or measured, not both."))  # fmt: skip
        twins = _twins(self._labels)
        if twins:
            found.append(Finding(level="warning", code="similar_labels", line=max(self._first_of_label[label] for label in twins),
                                 sentence=f"The labels '{twins[0]}' and '{twins[1]}' differ only in spelling and count as two classes."))  # fmt: skip
        return found


class _Keys:
    """Counts rows whose text came before, among the first million different ones. Keys are 64 bits wide; two texts share one by accident only."""

    def __init__(self) -> None:
        self._waiting: list[int] = []  # keys that came one by one
        self._arrays: list[np.ndarray] = []  # and many at once
        self._num_waiting = 0
        self._known: np.ndarray | None = None  # sorted
        self._repeated = 0

    def add(self, key: int) -> None:
        self._waiting.append(key)
        if len(self._waiting) >= _WAITING_KEYS:
            self._pack()

    def add_many(self, keys: np.ndarray) -> None:
        self._pack()
        self._put(keys)

    def num_repeated(self) -> int:
        if self._known is None and not self._arrays:  # a small file: not worth loading numpy
            return len(self._waiting) - len(set(self._waiting))
        self._pack()
        self._settle()
        return self._repeated

    def _pack(self) -> None:
        if self._waiting:
            import numpy as np

            keys, self._waiting = np.array(self._waiting, np.uint64), []
            self._put(keys)

    def _put(self, keys: np.ndarray) -> None:
        self._arrays.append(keys)
        self._num_waiting += len(keys)
        if self._num_waiting >= _WAITING_KEYS:
            self._settle()

    def _settle(self) -> None:
        import numpy as np

        if not self._num_waiting:
            return
        keys, self._arrays, self._num_waiting = np.concatenate(self._arrays), [], 0
        known = np.zeros(0, np.uint64) if self._known is None else self._known
        if len(known) + len(keys) > MAX_KEYS:
            self._known = self._with_first(known, keys)
            return
        found = np.sort(keys)
        found = found[np.flatnonzero(np.diff(found, prepend=~found[0]))]
        places = np.searchsorted(known, found)
        fresh = ~_known_at(known, places, found)
        self._repeated += len(keys) - int(fresh.sum())
        self._known = np.insert(known, places[fresh], found[fresh])

    def _with_first(self, known: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Where not all can be remembered: those that come first are."""
        import numpy as np

        found, first, counts = np.unique(keys, return_index=True, return_counts=True)
        places = np.searchsorted(known, found)
        old = _known_at(known, places, found)
        fresh = np.flatnonzero(~old)
        fresh = np.sort(fresh[np.argsort(first[fresh])[: MAX_KEYS - len(known)]])
        self._repeated += int(counts[old].sum()) + int((counts[fresh] - 1).sum())
        return np.insert(known, places[fresh], found[fresh])


def _known_at(known: np.ndarray, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which keys stand among the known ones, at the places where they would."""
    import numpy as np

    found = np.zeros(len(keys), bool)
    inside = places < len(known)
    found[inside] = known[places[inside]] == keys[inside]
    return found


def _key_of(parts: Sequence[Any]) -> int:
    """The key of a row's texts: a hash of each, spread by its place; `engine.io.batches` computes the same for whole columns."""
    key = 0
    for part in parts:
        key = (key * PART + (_key_of_turns(part) if isinstance(part, list) else _hash(part))) & _MASK
    return key


def _key_of_turns(turns: Sequence[Mapping[str, str]]) -> int:
    key = LIST
    for place, turn in enumerate(turns):
        key += (_hash(turn["content"]) + SPEAKER * SPEAKERS[turn["role"]]) * ((2 * place + 1) * TURN)
    return key


def _hash(text: str) -> int:
    return hash(text.encode("utf-8", "surrogatepass"))


def _spread(lengths: array[int]) -> tuple[float, float, int]:
    """Mean, 99th percentile and maximum."""
    if not lengths:
        return 0.0, 0.0, 0
    place = min(len(lengths) - 1, int(0.99 * len(lengths)))
    if len(lengths) < _MANY:
        ordered = sorted(lengths)
        return round(sum(ordered) / len(ordered), 2), float(ordered[place]), ordered[-1]
    import numpy as np

    view = np.frombuffer(lengths, np.uint32)
    total = int(view.sum(dtype=np.uint64))
    view.partition(place)  # in place: their order means nothing
    return round(total / len(view), 2), float(view[place]), int(view.max())


def _twins(labels: Mapping[str, int]) -> tuple[str, str] | None:
    seen: dict[str, str] = {}
    for label in sorted(labels):
        key = " ".join(label.casefold().split())
        if key in seen:
            return seen[key], label
        seen[key] = label
    return None


def _chars(value: Any) -> int:
    return sum(len(turn["content"]) for turn in value) if isinstance(value, list) else len(value)


def no_column(role: str, column: str, columns: Sequence[str]) -> Fault:
    """The fault that a role names a column which is not there."""
    return Fault(where=f"data.columns.{role}", what=f"There is no column '{column}'.", why=f"The columns are: {', '.join(columns)}.",
                 way_out="Choose one of them.", code="missing_column")  # fmt: skip
