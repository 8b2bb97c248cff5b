"""Data sets: look at a file (size, columns, shape, faults by line) and read its rows, in bounded memory and without torch."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.core.errors import EngineError, Fault, RecipeError
from engine.core.facts import DataFacts
from engine.io.formats import FORMATS, MAX_FILE_BYTES, read_raw, refuse_at_once, sniff_format
from engine.io.lines import Report, file_fault
from engine.io.shapes import MAX_LABELS, SHAPES, guess_shape, row_in_roles, shape_of

__all__ = [
    "FORMATS", "MAX_FILE_BYTES", "SHAPES", "Finding", "Inspection", "dataset_faults", "file_sha256", "guess_shape", "inspect", "read_rows", "shape_of",
    "row_in_roles", "sniff_format",
]  # fmt: skip

PREVIEW_ROWS = 20
MAX_FAULTS = 20
MIN_ROWS = 8
_SAMPLE_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something noticed in a file, as a whole sentence."""

    level: Literal["error", "warning", "note"]
    sentence: str
    code: str
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a look at a file told."""

    facts: DataFacts
    preview: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def inspect(
    path: Path,
    filename: str = "",
    *,
    mapping: Mapping[str, str] | None = None,
    refuse: bool = True,
    max_bytes: int = MAX_FILE_BYTES,
) -> Inspection:
    """Read a whole file once and say what it holds.

    mapping: role -> column as a person chose it; None means: guess.  refuse: raise a RecipeError that holds up to twenty faults with their lines;
    otherwise they stand in the findings with the level "error". A file that is no table at all always raises.
    """
    kind = sniff_format(path, filename)
    faults: list[Fault] = []

    def note(problem: Fault) -> None:
        faults.append(problem)
        if len(faults) >= MAX_FAULTS:
            raise _Enough

    survey = _Survey(dict(mapping) if mapping is not None else None, note)
    try:
        for line, raw in read_raw(path, kind, note, max_bytes=max_bytes):
            survey.see(line, raw)
        survey.finish()
    except _Enough:
        survey.finish_quietly()
    if not survey.num_raw and not faults:
        faults.append(
            file_fault("This file has a header and no rows." if kind in {"csv", "tsv", "parquet"} else "This file holds no row.",
                       "There is nothing to learn from.", "Export the table again with its rows.", "no_rows")
        )  # fmt: skip
    if faults and refuse:
        raise RecipeError(faults)
    facts = DataFacts(source=f"file:{path}", path=str(path), format=kind, sha256=file_sha256(path), **survey.facts())
    errors = [Finding(level="error", sentence=str(item), code=item.code, line=_line(item)) for item in faults]
    return Inspection(facts=facts, preview=survey.preview, findings=errors + survey.findings())


def read_rows(facts_or_path: DataFacts | Path, mapping: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Stream the usable rows as role -> value, in the order of the file. Rows without text, label or answer are left out, as `inspect` counted."""
    if isinstance(facts_or_path, DataFacts):
        path, kind = Path(facts_or_path.path), facts_or_path.format
        chosen = dict(mapping if mapping is not None else facts_or_path.mapping)
    else:
        path, kind = facts_or_path, sniff_format(facts_or_path)
        chosen = dict(mapping) if mapping is not None else inspect(path).facts.mapping
    for line, raw in read_raw(path, kind, refuse_at_once):
        row = row_in_roles(raw, chosen, line)
        if row is not None:
            yield row


def dataset_faults(
    data: DataFacts, task: str, data_shapes: Sequence[str], roles: Sequence[str], holdout: float = 0.15
) -> list[Fault]:
    """What is missing in the data for a task. `roles` are the columns that the task cannot do without (for its first shape)."""
    if data.shape not in data_shapes:
        wanted = " or ".join(f"'{SHAPES[name].title}'" for name in data_shapes if name in SHAPES)
        found = SHAPES[data.shape].title if data.shape in SHAPES else "no known shape"
        missing = [role for role in roles if role not in data.mapping]
        return [Fault(where="data.columns", what=f"These data do not fit the goal '{task}'.", code="wrong_shape",
                      why=f"It needs data of the shape {wanted} and these columns make: {found}.",
                      way_out=f"Say which column is the {' and which the '.join(missing)}, or choose other data." if missing
                      else "Choose other data, or another goal.")]  # fmt: skip
    faults = [
        _no_column(role, column, data.columns) for role, column in data.mapping.items() if column not in data.columns
    ]  # fmt: skip
    if faults:
        return faults
    if data.num_rows < MIN_ROWS:
        faults.append(Fault(where="data", what=f"Only {data.num_rows} rows can be used.", why=f"At least {MIN_ROWS} are needed to learn and to measure.",
                            way_out="Add more rows.", code="too_few_rows"))  # fmt: skip
    elif not 1 <= round(data.num_rows * holdout) < data.num_rows:
        faults.append(Fault(where="settings.holdout", what=f"A share of {holdout:g} of {data.num_rows} rows leaves none to measure with.",
                            why="Without held-out rows nobody could say whether it learned.",
                            way_out="Choose a larger share, or add rows.", code="no_holdout"))  # fmt: skip
    if "label" in data.mapping and SHAPES[data.shape].name == "classification":
        faults += _label_faults(data)
    return faults


def _no_column(role: str, column: str, columns: Sequence[str]) -> Fault:
    return Fault(where=f"data.columns.{role}", what=f"There is no column '{column}'.", why=f"The columns are: {', '.join(columns)}.",
                 way_out="Choose one of them.", code="missing_column")  # fmt: skip


def _label_faults(data: DataFacts) -> list[Fault]:
    column = data.mapping["label"]
    if len(data.labels) < 2:
        only = f"'{data.labels[0]}'" if data.labels else "nothing"
        return [Fault(where="data.columns.label", what=f"The column '{column}' holds one class only: {only}.",
                      why="A model that sorts needs at least two classes to choose from.",
                      way_out="Add rows of another class, or choose another column.", code="one_class")]  # fmt: skip
    if len(data.labels) >= MAX_LABELS:
        return [Fault(where="data.columns.label", what=f"The column '{column}' holds {MAX_LABELS:,} different values or more.",
                      why="That is a text or a number, not the name of a class.", way_out="Choose another column as the label.",
                      code="too_many_classes")]  # fmt: skip
    return []


class _Enough(Exception):
    """Twenty faults are enough to say that a file is wrong."""


class _Survey:
    """Gathers the facts in one pass: a first few rows decide the roles, then every row is counted."""

    def __init__(self, mapping: dict[str, str] | None, report: Report) -> None:
        self.mapping = mapping
        self.report = report
        self.columns: dict[str, None] = {}
        self.waiting: list[tuple[int, dict[str, Any]]] = []
        self.decided = False
        self.preview: list[dict[str, Any]] = []
        self.num_raw = self.num_usable = 0
        self.lengths = array("Q")
        self.labels: Counter[str] = Counter()
        self.left_out: list[int] = []
        self.num_left_out = 0
        self.first_of_label: dict[str, int] = {}
        self.texts: set[int] = set()
        self.num_repeated = 0

    def see(self, line: int, raw: dict[str, Any]) -> None:
        self.num_raw += 1
        if len(self.columns) < 512:
            self.columns.update(dict.fromkeys(raw))
        if len(self.preview) < PREVIEW_ROWS:
            self.preview.append(raw)
        if self.decided:
            self._count(line, raw)
            return
        self.waiting.append((line, raw))
        if len(self.waiting) >= _SAMPLE_ROWS:
            self._decide()

    def _decide(self) -> None:
        self.decided = True
        if self.mapping is None:
            _, self.mapping = guess_shape(tuple(self.columns), [raw for _, raw in self.waiting])
        waiting, self.waiting = self.waiting, []
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
            if len(self.left_out) < 5:
                self.left_out.append(line)
            return
        self.num_usable += 1
        label = row.get("label")
        if label is not None and (label in self.labels or len(self.labels) < MAX_LABELS):
            self.labels[label] += 1
            self.first_of_label.setdefault(label, line)
        parts = [value for role, value in row.items() if role != "label"]
        self.lengths.append(sum(_chars(part) for part in parts))
        key = hash(str(parts))
        self.num_repeated += key in self.texts
        if len(self.texts) < 1_000_000:
            self.texts.add(key)

    def finish(self) -> None:
        if not self.decided:
            self._decide()
        for role, column in (self.mapping or {}).items():
            if column not in self.columns and self.num_raw:
                self.report(_no_column(role, column, tuple(self.columns)))

    def finish_quietly(self) -> None:
        self.report = lambda problem: None
        self.finish()

    def facts(self) -> dict[str, Any]:
        mapping = self.mapping or {}
        ordered = sorted(self.lengths)
        labels = sorted(self.labels)
        return {
            "shape": shape_of(tuple(mapping)), "num_rows": self.num_usable if mapping else self.num_raw, "columns": tuple(self.columns),
            "mapping": dict(mapping), "labels": tuple(labels), "label_counts": tuple(self.labels[label] for label in labels),
            "mean_chars": round(sum(ordered) / max(1, len(ordered)), 2),
            "p99_chars": float(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]) if ordered else 0.0,
            "max_chars": int(ordered[-1]) if ordered else 0,
        }  # fmt: skip

    def findings(self) -> list[Finding]:
        """Warnings and notes; faults went to the report."""
        mapping, found = self.mapping or {}, []
        if not mapping and self.num_raw:
            found.append(Finding(level="warning", code="unknown_shape",
                                 sentence="Nobody can tell from the columns what is to be learned; say which column plays which role."))  # fmt: skip
        if mapping and self.num_left_out:
            first = self.left_out[0]
            verb = "row is" if self.num_left_out == 1 else "rows are"
            found.append(Finding(level="warning", code="rows_left_out", line=first,
                                 sentence=f"{self.num_left_out:,} {verb} left out because something is missing there, first in line {first:,}."))  # fmt: skip
        if "label" in mapping:
            found += self._label_findings()
        if self.num_repeated and shape_of(tuple(mapping)) != "text":
            found.append(Finding(level="note", code="repeated_rows", sentence=f"{self.num_repeated:,} of {self.num_usable:,} rows repeat an earlier text; "
                                 "repeated texts can make the measured result look better than it is."))  # fmt: skip
        return found

    def _label_findings(self) -> list[Finding]:
        if len(self.labels) == 1:
            only = next(iter(self.labels))
            return [
                Finding(
                    level="warning",
                    code="one_class",
                    sentence=f"All rows have the same label, '{only}'; sorting needs at least two.",
                )
            ]
        if len(self.labels) >= MAX_LABELS:
            return [Finding(level="warning", code="too_many_classes",
                            sentence=f"The label column holds {MAX_LABELS:,} different values or more; it is probably not a label.")]  # fmt: skip
        single = sorted(label for label, count in self.labels.items() if count == 1)
        found = []
        if single:
            line = self.first_of_label[single[0]]
            names = ", ".join(f"'{label}'" for label in single[:5]) + (" and more" if len(single) > 5 else "")
            found.append(Finding(level="warning", code="rare_class", line=line,
                                 sentence=f"There is only one row with the label {names}; it can be learned or measured, not both."))  # fmt: skip
        twins = _twins(self.labels)
        if twins:
            found.append(Finding(level="warning", code="similar_labels", line=max(self.first_of_label[label] for label in twins),
                                 sentence=f"The labels '{twins[0]}' and '{twins[1]}' differ only in spelling and count as two classes."))  # fmt: skip
        return found


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


def _line(problem: Fault) -> int | None:
    word, _, number = problem.where.partition(" ")
    return int(number) if word == "line" and number.isdigit() else None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
