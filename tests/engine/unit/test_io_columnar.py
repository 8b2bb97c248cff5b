"""A look in whole columns tells exactly what a look at each row tells: facts, preview, findings, faults with their lines."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.bench.whole_runs import shared_folder
from engine.core.errors import EngineError, RecipeError
from engine.io import columnar, datasets, survey
from engine.io.datasets import inspect
from tests.engine.unit.test_io_datasets import BAD_LINES, WRONG_FILES, as_csv, as_jsonl, as_parquet, write

NUM_ROWS = 700  # beyond the first rows that decide the roles, so that blocks follow
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Columns for the smallest file, in blocks of a few rows; the list says how many rows were counted in columns."""
    monkeypatch.setattr(columnar, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(columnar, "BATCH_ROWS", 64)
    counted: list[int] = []
    take = survey.Survey.take

    def noted(self: survey.Survey, found: survey.Counted, before: int) -> None:
        counted.append(found.num_rows)
        take(self, found, before)

    monkeypatch.setattr(survey.Survey, "take", noted)
    yield counted


def told(path: Path, *, columns: bool, **options: Any) -> Any:
    """What a look tells: an Inspection, or the faults."""
    before = datasets.MIN_COLUMNAR_BYTES
    datasets.MIN_COLUMNAR_BYTES = 0 if columns else 1 << 60
    try:
        return inspect(path, **options)
    except RecipeError as error:
        return error.faults
    except EngineError as error:
        return [error.fault]
    except ValueError as error:
        return repr(error)
    finally:
        datasets.MIN_COLUMNAR_BYTES = before


def assert_same(path: Path, **options: Any) -> Any:
    rows, whole = told(path, columns=False, **options), told(path, columns=True, **options)
    assert whole == rows
    return rows


def labelled(number: int) -> dict[str, Any]:
    return {"text": f'  row {number % 500} – “quoted”, or "so"\n', "label": ["b", "grüße", " b"][number % 3]}


TABLES: dict[str, Callable[[int], dict[str, Any]]] = {
    "labelled": labelled,
    "numbers": lambda n: {"id": n, "text": f"text {n}", "label": n % 4, "score": n / 7, "good": n % 2 == 0, "none": None},
    "floats as labels": lambda n: {"text": f"text {n}", "label": float(n % 3) if n % 5 else 0.5},
    "chat": lambda n: {"messages": TURNS * (n % 3) + [{"role": "assistant", "content": f"  {n % 90}\u3000"}]},
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"a {n}"}, {"from": "gpt", "value": " " * (n % 2) + "ok"[: n % 3]}]},
    "requests": lambda n: {"instruction": f"do {n}", "input": "" if n % 2 else "\u00a0x", "output": f"done {n}", "system": "s"},
    "problems": lambda n: {"question": f"q {n}", "answer": n, "hint": f"h {n}"},
    "preferences": lambda n: {"prompt": f"p {n}", "chosen": f"c {n}", "rejected": "" if n == 600 else "r"},
    "nested beside": lambda n: {"text": f"story {n} " * 3, "more": {"tags": ["a"] * (n % 3), "at": [n / 2]}, "list": [[n]]},
    "nothing to learn": lambda n: {"a": n / 3, "b": n / 5},
    "many labels": lambda n: {"text": f"some longer text {n}", "label": f"kind {n % 200 if n < 200 else n}"},
    "one label": lambda n: {"text": f"t {n}", "label": "only"},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "tsv"])
def test_regular_files_are_counted_in_columns(tmp_path: Path, blocks: list[int], name: str, kind: str) -> None:
    rows = [TABLES[name](number) for number in range(NUM_ROWS)]
    if kind in {"csv", "tsv"} and any(isinstance(cell, list | dict) for cell in rows[0].values()):
        rows = [
            {"text": str(number), **{key: str(cell) for key, cell in row.items()}} for number, row in enumerate(rows)
        ]
    body = {"jsonl": as_jsonl, "parquet": as_parquet, "csv": as_csv, "tsv": lambda rows: as_csv(rows, "\t")}[kind](rows)
    seen = assert_same(write(tmp_path, f"a.{kind}", body))
    assert seen.facts.num_rows + sum("left out" in finding.sentence for finding in seen.findings) >= NUM_ROWS / 3
    assert sum(blocks) == NUM_ROWS


def changed(body: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    assert old in body
    before, _, after = body.rpartition(old) if last else body.partition(old)
    return before + new + after


LINES = as_jsonl([{"id": n, "text": f"text {n}", "label": "ab"[n % 2], "score": n / 2 + 0.25} for n in range(NUM_ROWS)])
CHAT = as_jsonl([{"messages": [*TURNS, {"role": "user", "content": f"last {n}"}]} for n in range(NUM_ROWS)])
TABLE = as_csv([{"text": f"text, {n}", "label": "ab"[n % 2]} for n in range(NUM_ROWS)])
UNUSUAL: dict[str, tuple[str, bytes]] = {
    "a number that is none": ("a.jsonl", changed(LINES, b"251.75", b"NaN")),
    "an endless number": ("a.jsonl", changed(LINES, b"251.75", b"Infinity")),
    "a whole number among others": ("a.jsonl", changed(LINES, b"251.75", b"252")),
    "a number of many digits": ("a.jsonl", changed(LINES, b"251.75", b"9" * 4400)),
    "text for a number": ("a.jsonl", changed(LINES, b"251.75", b'"x"')),
    "another column": ("a.jsonl", changed(LINES, b'{"id": 500', b'{"x": 500')),
    "a name twice": ("a.jsonl", changed(LINES, b'"id": 500', b'"text": 500')),
    "two rows in a line": ("a.jsonl", changed(LINES, b'}\n{"id": 500', b'} {"id": 500')),
    "a row over two lines": ("a.jsonl", changed(LINES, b'{"id": 500', b'{\n"id": 500')),
    "two rows and two lines": ("a.jsonl", changed(changed(LINES, b'}\n{"id": 500', b'} {"id": 500'), b'{"id": 501', b'{\n"id": 501')),
    "an empty line": ("a.jsonl", changed(LINES, b'{"id": 500', b'\n{"id": 500')),
    "space behind a row": ("a.jsonl", changed(LINES, b'}\n{"id": 500', b'} \n{"id": 500')),
    "half a pair": ("a.jsonl", changed(LINES, b"text 500", b"text \\ud800")),
    "no UTF-8": ("a.jsonl", changed(LINES, b"text 500", b"text \xff")),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES),
    "a mark in the middle": ("a.jsonl", changed(LINES, b'{"id": 500', b'\xef\xbb\xbf{"id": 500')),
    "line ends of Windows": ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
    "mixed line ends": ("a.jsonl", changed(LINES, b'}\n{"id": 500', b'}\r\n{"id": 500')),
    "cut short": ("a.jsonl", LINES[:-20]),
    "a zero byte": ("a.jsonl", changed(LINES, b"text 500", b"text \x00")),
    "a written zero": ("a.jsonl", changed(LINES, b"text 500", b"\\u0000")),
    "a list for a text": ("a.jsonl", changed(LINES, b'"text 500"', b"[1]")),
    "nothing for a text": ("a.jsonl", changed(LINES, b'"text 500"', b"null")),
    "a long line": ("a.jsonl", changed(LINES, b"text 500", b"x" * 5_000_000)),
    "a long cell": ("a.jsonl", changed(LINES, b"text 500", b"x" * 2_000_000)),
    "a wide cell that is not long": ("a.jsonl", changed(LINES, b"text 500", "ü".encode() * 700_000)),
    "faults in many places": ("a.jsonl", LINES.replace(b"50,", b"50")),
    "an unknown speaker": ("a.jsonl", changed(CHAT, b'"user", "content": "last 500"', b'"ghost", "content": "last 500"')),
    "another name for a speaker": ("a.jsonl", changed(CHAT, b'"user", "content": "last 500"', b'"Human", "content": "last 500"')),
    "a turn without speaker": ("a.jsonl", changed(CHAT, b'"role": "user", "content": "last 500"', b'"content": "last 500"')),
    "a turn without words": ("a.jsonl", changed(CHAT, b', "content": "last 500"', b"")),
    "an empty turn": ("a.jsonl", changed(CHAT, b'{"role": "user", "content": "last 500"}', b"null")),
    "no conversation": ("a.jsonl", changed(CHAT, b'{"messages": [{', b'{"messages": []}\n{"messages": [{', last=True)),
    "null for a conversation": ("a.jsonl", changed(CHAT, b'{"messages": [{', b'{"messages": null}\n{"messages": [{', last=True)),
    "parts of a turn": ("a.jsonl", changed(CHAT, b'"last 500"', b'[{"type": "text", "text": "a"}]')),
    "more in a turn": ("a.jsonl", changed(CHAT, b'"last 500"', b'"last", "name": "x"')),
    "a ragged record": ("a.csv", changed(TABLE, b'"text, 500"', b"text, 500")),
    "an empty record": ("a.csv", changed(TABLE, b'"text, 500"', b'\r\n"text, 500"')),
    "a record of blanks": ("a.csv", changed(TABLE, b'"text, 500"', b'   \r\n"text, 500"')),
    "an open mark": ("a.csv", changed(TABLE, b'"text, 500"', b'"text, 500')),
    "text behind a mark": ("a.csv", changed(TABLE, b'"text, 500"', b'"text, 500" x')),
    "a mark inside": ("a.csv", changed(TABLE, b'"text, 500"', b'text "500"')),
    "space before a mark": ("a.csv", changed(TABLE, b'"text, 500"', b' "text 500"')),
    "doubled marks": ("a.csv", changed(TABLE, b'"text, 500"', b'"""text"", ""500"""')),
    "empty marks": ("a.csv", changed(TABLE, b'"text, 500"', b'""')),
    "breaks in a cell": ("a.csv", changed(TABLE, b'"text, 400"', b'"text\n\n,\r\n 400"') + b'"x",\r\n'),
    "a lone return": ("a.csv", changed(TABLE, b'"text, 500"', b"text\r500")),
    "a return in marks": ("a.csv", changed(TABLE, b'"text, 500"', b'"text\r500"')),
    "a table with no UTF-8": ("a.csv", changed(TABLE, b"500", b"\xff")),
    "a table with a zero byte": ("a.csv", changed(TABLE, b"500", b"\x00")),
    "a table with a long cell": ("a.csv", changed(TABLE, b"500", b"x" * 2_000_000)),
    "a table with a mark": ("a.csv", b"\xef\xbb\xbf" + TABLE),
    "a header over two lines": ("a.csv", b'\r\n"text\nof all",label' + TABLE.partition(b"label")[2]),
    "words for nothing": ("a.csv", changed(TABLE, b'"text, 500"', b"NULL")),
    "no last line end": ("a.csv", TABLE.rstrip()),
    "damaged Parquet": ("a.parquet", changed(as_parquet([labelled(n) for n in range(NUM_ROWS)]), b"PAR1", b"PAR1xxxx")),
    "binary Parquet": ("a.parquet", as_parquet([{"text": f"t {n}", "more": b"x"} for n in range(NUM_ROWS)])),
    "a date in Parquet": ("a.parquet", as_parquet([{"text": f"t {n}", "more": __import__("datetime").date(2020, 1, 1)} for n in range(NUM_ROWS)])),
    "a long cell in Parquet": ("a.parquet", as_parquet([{"text": f"t {n}" * (400_000 if n == 500 else 1)} for n in range(NUM_ROWS)])),
}  # fmt: skip


@pytest.mark.parametrize("refuse", [True, False])
@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_told_as_by_rows(tmp_path: Path, blocks: list[int], case: str, refuse: bool) -> None:
    name, body = UNUSUAL[case]
    assert_same(write(tmp_path, name, body), refuse=refuse)


def test_a_row_that_is_unusual_costs_its_block_only(tmp_path: Path, blocks: list[int]) -> None:
    name, body = UNUSUAL["a mark in the middle"]
    assert told(write(tmp_path, name, body), columns=True)[0].where == "line 501" and 400 < sum(blocks) < 500
    blocks.clear()
    told(write(tmp_path, name, UNUSUAL["an empty line"][1]), columns=True)
    assert NUM_ROWS - 100 < sum(blocks) < NUM_ROWS


@pytest.mark.parametrize("case", [*BAD_LINES, *WRONG_FILES])
def test_faults_of_small_files_are_the_same(tmp_path: Path, blocks: list[int], case: str) -> None:
    name, body = BAD_LINES[case][:2] if case in BAD_LINES else WRONG_FILES[case][:2]
    faults = assert_same(write(tmp_path, name, body))
    if name.endswith("l") and case in BAD_LINES:
        rows = b"\n".join([(body.encode() if isinstance(body, str) else body).split(b"\n")[0]] * 300) + b"\n"
        whole = rows + (body.encode() if isinstance(body, str) else body)
        (fault, *_) = assert_same(write(tmp_path, name, whole))
        assert fault.where == f"line {int(faults[0].where.split()[1]) + 300}"


def test_chosen_roles_are_kept(tmp_path: Path, blocks: list[int]) -> None:
    path = write(tmp_path, "a.jsonl", LINES)
    chosen: list[dict[str, str]] = [
        {"text": "label", "label": "text"},
        {"text": "score"},
        {"label": "score"},
        {"text": "nowhere"},
        {},
    ]
    for mapping in [*chosen, {"instruction": "id", "output": "text"}]:
        assert_same(path, mapping=mapping, refuse=False)
    assert sum(blocks) == 5 * NUM_ROWS


def test_repeated_texts_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "MAX_KEYS", 50)
    monkeypatch.setattr(survey, "_WAITING_KEYS", 7)
    import numpy as np

    draw = random.Random(1)
    for _ in range(50):
        keys = [draw.randrange(120) for _ in range(400)]
        known: set[int] = set()
        expected = 0
        for key in keys:
            expected += key in known
            if len(known) < 50:
                known.add(key)
        found = survey._Keys()
        at = 0
        while at < len(keys):
            size = draw.randrange(1, 40)
            if draw.random() < 0.5:
                found.add_many(np.array(keys[at : at + size], np.uint64))
            else:
                for key in keys[at : at + size]:
                    found.add(key)
            at += size
        found.add_many(np.zeros(0, np.uint64))
        assert found.num_repeated() == expected


TEXTS = st.text(
    st.characters(codec="utf-8") | st.sampled_from(' \t\n\r",;|\\{}[]:\u3000\u00a0\u2028\x1c\x85'), max_size=12
)
CELLS = TEXTS | st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.lists(TEXTS, max_size=2)
SPEAKERS = st.sampled_from(["user", "assistant", "assistant", "GPT", "system", "tool", "nobody"])
CHATS = st.lists(st.fixed_dictionaries({"role": SPEAKERS, "content": TEXTS | st.none()}), max_size=3)
ROW_KINDS: list[st.SearchStrategy[dict[str, Any]]] = [
    st.fixed_dictionaries({"text": TEXTS, "label": st.sampled_from(["a", "b", " a", "", "ü"])}),
    st.fixed_dictionaries({"text": TEXTS, "label": st.integers(0, 3), "x": st.floats(allow_nan=False) | st.none()}),
    st.fixed_dictionaries({"messages": CHATS}),
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": TEXTS, "more": CELLS}),
    st.dictionaries(st.sampled_from(["text", "label", "a", "b"]), CELLS, max_size=4),
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_any_file_is_told_the_same(tmp_path: Path, blocks: list[int], data: st.DataObject) -> None:
    start = data.draw(st.lists(data.draw(st.sampled_from(ROW_KINDS[:4])), min_size=3, max_size=6))
    more = data.draw(st.lists(data.draw(st.sampled_from(ROW_KINDS)), max_size=6))
    rows = start * 80 + more + start * 40
    kind = data.draw(st.sampled_from(["jsonl", "csv"]))
    if kind == "jsonl":
        ascii_only = data.draw(st.booleans())
        body = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode("utf-8", "replace")
    else:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
        writer.writerow(start[0])
        writer.writerows([list(row.values()) for row in rows])
        body = out.getvalue().encode("utf-8", "replace")
    for _ in range(data.draw(st.integers(0, 2))):  # damage
        place, gone = data.draw(st.integers(0, len(body))), data.draw(st.integers(0, 2))
        put = data.draw(st.sampled_from([b"", b'"', b"\n", b"}", b"\\", b"\xff", b",", b"{", b"\r"]))
        body = body[:place] + put + body[place + gone :]
    assert_same(write(tmp_path, f"a.{kind}", body), refuse=data.draw(st.booleans()))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_any_parquet_file_is_told_the_same(tmp_path: Path, blocks: list[int], data: st.DataObject) -> None:
    start = data.draw(st.lists(data.draw(st.sampled_from(ROW_KINDS[:4])), min_size=3, max_size=6))
    rows = [{key: row.get(key) for key in start[0]} for row in start * 80]
    try:
        body = as_parquet(rows)
    except (ValueError, OverflowError, TypeError):  # no table of one type for each column
        return
    assert_same(write(tmp_path, "a.parquet", body), refuse=data.draw(st.booleans()))


SHARED = shared_folder()


@pytest.mark.skipif(SHARED is None, reason="the public data sets are not here")
def test_real_files_are_told_the_same(blocks: list[int]) -> None:
    assert SHARED is not None
    paths = sorted(path for path in SHARED.rglob("*") if path.suffix in {".jsonl", ".csv", ".tsv", ".parquet"})
    for path in paths:
        assert_same(path, refuse=False)
    assert len(paths) > 20 and sum(blocks) > 20_000
