"""Data sets: look at a file (size, columns, shape, faults by line) and read its rows, in bounded memory and without torch."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.errors import Fault, RecipeError
from engine.core.facts import DataFacts
from engine.io.formats import FORMATS, MAX_FILE_BYTES, read_raw, refuse_at_once, sniff_format
from engine.io.lines import TOP, file_fault
from engine.io.shapes import MAX_LABELS, SHAPES, guess_shape, row_in_roles, shape_of
from engine.io.survey import Finding, Survey, no_column

__all__ = [
    "FORMATS", "MAX_FILE_BYTES", "SHAPES", "Finding", "Inspection", "dataset_faults", "file_sha256", "guess_shape", "inspect", "read_rows", "shape_of",
    "row_in_roles", "sniff_format",
]  # fmt: skip

MAX_FAULTS = 20
MIN_ROWS = 8
MIN_COLUMNAR_BYTES = 8_000_000  # smaller files are read by rows in about the time that loading Arrow takes


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
    with _Checksum(path) as checksum:
        survey, faults = _surveyed(path, kind, mapping, max_bytes)
        if not survey.num_raw and not faults:
            faults.append(
                file_fault("This file has a header and no rows." if kind in {"csv", "tsv", "parquet"} else "This file holds no row.",
                           "There is nothing to learn from.", "Export the table again with its rows.", "no_rows")
            )  # fmt: skip
        if faults and refuse:
            raise RecipeError(faults)
        facts = DataFacts(
            source=f"file:{path}", path=str(path), format=kind, sha256=checksum.result(), **survey.facts()
        )
    errors = [Finding(level="error", sentence=str(item), code=item.code, line=_line(item)) for item in faults]
    return Inspection(facts=facts, preview=survey.preview, findings=errors + survey.findings())


def _surveyed(path: Path, kind: str, mapping: Mapping[str, str] | None, max_bytes: int) -> tuple[Survey, list[Fault]]:
    """A file read to its end, or to as many faults as are enough: in columns as far as that goes, otherwise by rows."""
    faults: list[Fault] = []

    def note(problem: Fault) -> None:
        faults.append(problem)
        if len(faults) >= MAX_FAULTS:
            raise _Enough

    def fresh() -> Survey:
        faults.clear()
        return Survey(dict(mapping) if mapping is not None else None, note)

    survey, start = fresh(), TOP
    try:
        if MIN_COLUMNAR_BYTES <= path.stat().st_size <= max_bytes:
            from engine.io.columnar import KINDS, NotColumnar, survey_columns

            try:
                going_on = survey_columns(path, kind, survey) if kind in KINDS else TOP
            except NotColumnar:
                survey, going_on = fresh(), TOP
            if going_on is None:
                survey.finish()
                return survey, faults
            start = going_on
        for line, raw in read_raw(path, kind, note, max_bytes=max_bytes, start=start):
            survey.see(line, raw)
        survey.finish()
    except _Enough:
        survey.finish_quietly()
    return survey, faults


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
        no_column(role, column, data.columns) for role, column in data.mapping.items() if column not in data.columns
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


def _line(problem: Fault) -> int | None:
    word, _, number = problem.where.partition(" ")
    return int(number) if word == "line" and number.isdigit() else None


class _Checksum:
    """The checksum of a file, computed beside the reading where the file is large."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._found: Future[str] | None = None

    def __enter__(self) -> _Checksum:
        if self._path.stat().st_size >= MIN_COLUMNAR_BYTES:
            self._found = Future()
            threading.Thread(target=self._compute, args=(self._found,), name="checksum", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # a file that is refused needs none

    def _compute(self, found: Future[str]) -> None:
        try:
            found.set_result(file_sha256(self._path, self._stop.is_set))
        except OSError as error:
            found.set_exception(error)

    def result(self) -> str:
        return self._found.result() if self._found is not None else file_sha256(self._path)


def file_sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while (piece := file.read(1 << 20)) and not stopped():
            digest.update(piece)
    return digest.hexdigest()
