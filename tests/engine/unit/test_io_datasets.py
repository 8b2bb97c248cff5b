"""Data files: five formats give the same rows, shapes are guessed, and everything that is wrong is said with its line."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import EngineError, RecipeError
from engine.io.datasets import dataset_faults, guess_shape, inspect, read_rows, sniff_format
from engine.io.formats import read_raw

ROWS = [
    {"text": 'She said "no", twice;\nthen left.', "label": "grüße"},
    {"text": "tab\there and a comma, there", "label": "b"},
    *({"text": f"row {number} – “quoted”", "label": "b" if number % 2 else "grüße"} for number in range(20)),
]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", mark: bytes = b"") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return mark + out.getvalue().encode()


def as_jsonl(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def write(folder: Path, name: str, body: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    return path


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.csv": as_csv,
    "mark.csv": lambda rows: as_csv(rows, mark=b"\xef\xbb\xbf"),
    "semicolon.csv": lambda rows: as_csv(rows, ";"),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "a.jsonl": as_jsonl,
    "lines.json": as_jsonl,
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, WRITERS[name](ROWS))
    seen = inspect(path)
    assert list(read_rows(seen.facts)) == ROWS
    facts = seen.facts
    assert (facts.shape, facts.mapping, facts.num_rows) == (
        "classification",
        {"text": "text", "label": "label"},
        len(ROWS),
    )
    assert facts.labels == ("b", "grüße") and sum(facts.label_counts) == len(ROWS)
    assert facts.max_chars == max(len(row["text"]) for row in ROWS)
    assert not seen.findings and len(seen.preview) == 20


def test_an_upload_without_ending_is_known_by_its_content(tmp_path: Path) -> None:
    for name, kind in {
        "a.csv": "csv",
        "semicolon.csv": "csv",
        "a.tsv": "tsv",
        "a.json": "json",
        "a.jsonl": "jsonl",
        "a.parquet": "parquet",
    }.items():
        assert sniff_format(write(tmp_path, "original", WRITERS[name](ROWS))) == kind


def test_paragraphs_of_a_text_are_rows_with_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n\n\nthree\n")
    assert list(read_raw(path, "txt")) == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    long = write(tmp_path, "b.txt", "word " * 50 + "\n" + "\n".join(["line " * 40] * 400))
    pieces = [row["text"] for _, row in read_raw(long, "txt")]
    assert len(pieces) > 1 and "\n".join(pieces).split() == long.read_text().split()


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = "text,label\n" + "".join(f"t{n},{n % 2}\n" for n in range(3))
BAD_LINES: dict[str, tuple[str, bytes | str, str, int]] = {
    "ragged": ("a.csv", GOOD + "x,y,z\n", "ragged_line", 5),
    "ragged behind a quoted line break": ("a.csv", 'text,label\n"a\nb",1\nonly\n', "ragged_line", 4),
    "open quotation mark": ("a.csv", GOOD + '"never closed,1\nx,2\n', "open_quote", 5),
    "text behind a quotation mark": ("a.csv", GOOD + '"a" b,1\n', "bad_quote", 5),
    "not UTF-8": ("a.csv", GOOD.encode() + b"caf\xe9,1\n", "not_utf8", 5),
    "not UTF-8 in JSON": ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "not_utf8", 2),
    "zero byte far behind": ("a.csv", GOOD.encode() + b"y,1\n" * 20_000 + b"x\x00,1\n", "wrong_file", 20_005),
    "column twice": ("a.csv", "text,text\na,b\n", "duplicate_columns", 1),
    "too many columns": ("a.csv", ",".join(f"c{n}" for n in range(600)) + "\n", "too_many_columns", 1),
    "invalid JSONL": ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "invalid_json", 3),
    "name twice": ("a.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n', "duplicate_columns", 2),
    "not a number": ("a.jsonl", '{"text": "a"}\n{"text": NaN}\n', "invalid_json", 2),
    "row is a list": ("a.jsonl", '{"text": "a"}\n[1, 2]\n', "not_an_object", 2),
    "nested too deep": ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 60 + "]" * 60 + "}\n", "too_deep", 2),
    "nesting bomb": ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 200_000 + "\n", "too_deep", 2),
    "nesting bomb in a list": ("a.json", '[{"text": "a"},\n{"text": ' + "[" * 200_000, "too_deep", 2),
    "invalid JSON": ("a.json", '[\n {"text": "a"},\n {"text": b}\n]', "invalid_json", 3),
    "comma missing": ("a.json", '[\n {"text": "a"}\n {"text": "b"}\n]', "invalid_json", 3),
    "list never ends": ("a.json", '[\n {"text": "a"}\n', "invalid_json", 3),
    "two lists": ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', "invalid_json", 2),
    "one object": ("a.json", '{\n "text": "a"\n}', "not_a_list", 1),
    "line of ten megabytes": ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 10_000_000 + b'"}\n', "long_line", 2),
    "row of ten megabytes in a list": ("a.json", b'[{"text": "a"},\n{"text": "' + b"x" * 10_000_000 + b'"}]', "long_line", 2),
    "cell of two megabytes": ("a.csv", GOOD.encode() + b"x" * 2_000_000 + b",1\n", "long_cell", 5),
    "JSON cell of two megabytes": ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 2_000_000 + b'"}\n', "long_cell", 2),
    "a conversation of numbers": ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": [1]}\n',
                                  "not_messages", 2),
    "an unknown speaker": ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
                           '{"messages": [{"role": "ghost", "content": "a"}]}\n', "not_messages", 2),
    "a list where a text belongs": ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": ["a"], "label": "y"}\n', "not_text", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_fault_is_said_with_its_line(tmp_path: Path, case: str) -> None:
    name, body, code, line = BAD_LINES[case]
    path = write(tmp_path, name, body)
    with pytest.raises(EngineError) as caught:
        inspect(path)
    fault = caught.value.faults[0] if isinstance(caught.value, RecipeError) else caught.value.fault
    assert (fault.code, fault.where) == (code, f"line {line}")
    assert f"Line {line:,}" in fault.what
    assert all(sentence.rstrip().endswith((".", "!")) for sentence in (fault.what, fault.why, fault.way_out)), fault


def test_several_faults_come_at_once_and_can_be_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", GOOD + "x\n" + "ok,1\n" + "a,b,c\n" + "y\n" * 40)
    with pytest.raises(RecipeError) as caught:
        inspect(path)
    assert [fault.where for fault in caught.value.faults[:3]] == ["line 5", "line 7", "line 8"] and len(
        caught.value.faults
    ) == 20
    seen = inspect(path, refuse=False)
    assert [finding.line for finding in seen.findings if finding.level == "error"][:2] == [
        5,
        7,
    ] and seen.facts.num_rows == 4


def excel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    return out.getvalue()


WRONG_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.csv", b"", "empty_file"),
    "blank": ("a.csv", b"\xef\xbb\xbf \n\n", "empty_file"),
    "header only": ("a.csv", b"text,label\n", "no_rows"),
    "empty list": ("a.json", b" [ ]", "no_rows"),
    "image called csv": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(50), "wrong_file"),
    "pickle": ("a.json", pickle.dumps([1, 2]), "wrong_file"),
    "excel called csv": ("a.csv", excel(), "wrong_file"),
    "UTF-16": ("a.csv", "text,label\na,b\n".encode("utf-16"), "wrong_file"),
    "web page": ("a.csv", b"<!DOCTYPE html><html></html>", "wrong_file"),
    "text called parquet": ("a.parquet", b"text,label\na,b\n", "wrong_file"),
    "text called json": ("a.json", b"hello", "invalid_json"),
    "damaged parquet": ("a.parquet", as_parquet(ROWS)[:-20], "damaged_file"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    name, body, code = WRONG_FILES[case]
    with pytest.raises(EngineError) as caught:
        inspect(write(tmp_path, name, body))
    assert caught.value.fault.code == code
    assert caught.value.fault.way_out.endswith(".")


def test_a_file_may_be_too_large(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="at most"):
        inspect(write(tmp_path, "a.csv", GOOD), max_bytes=10)


def test_a_large_list_is_read_in_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 40, "label": "a"})
    path = write(tmp_path, "a.json", "[" + ",".join([row] * 60_000) + "]")
    size = path.stat().st_size
    tracemalloc.start()
    count = sum(1 for _ in read_raw(path, "json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000 and size > 12_000_000 and peak < 9_000_000


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
GUESSES: dict[str, tuple[list[dict[str, Any]], str, dict[str, str]]] = {
    "named": ([{"id": n, "Text": f"some words {n}", "Category": "ab"[n % 2]} for n in range(9)], "classification", {"text": "Text", "label": "Category"}),
    "by content": ([{"x1": f"a longer text number {n}", "x2": n % 3} for n in range(30)], "classification", {"text": "x1", "label": "x2"}),
    "messages": ([{"id": 1, "messages": TURNS}], "messages", {"messages": "messages"}),
    "sharegpt": ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}], "messages", {"messages": "conversations"}),
    "alpaca": ([{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(9)] + [{"instruction": "a", "input": "b", "output": "c"}],
               "instruction", {"instruction": "instruction", "output": "output", "input": "input"}),
    "prompt": ([{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(9)], "instruction", {"instruction": "prompt", "output": "completion"}),
    "question": ([{"question": f"q {n}", "answer": f"a {n}"} for n in range(9)], "instruction", {"instruction": "question", "output": "answer"}),
    "preferences": ([{"prompt": "p", "chosen": "c", "rejected": "r", "score": 1.5}], "preferences",
                    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
    "text": ([{"id": n, "text": f"story {n} " * 5} for n in range(20)], "text", {"text": "text"}),
    "numbers only": ([{"a": 1.5, "b": 2.5}], "unknown", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", GUESSES)
def test_shapes_are_guessed(case: str) -> None:
    rows, shape, mapping = GUESSES[case]
    assert guess_shape(tuple(rows[0]), rows) == (shape, mapping)


def test_conversations_of_other_layouts_become_messages(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {
            "conversations": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
            ]
        },
    ]
    path = write(tmp_path, "a.jsonl", as_jsonl(rows))
    expected = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert list(read_rows(path)) == [expected, expected]
    cells = write(tmp_path, "b.csv", as_csv([{"messages": json.dumps(TURNS)}]))
    assert list(read_rows(cells)) == [{"messages": TURNS}]


def test_rows_without_text_or_label_are_left_out_and_said(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.csv", "text,label\n" + "".join(f"word {n},{'ab'[n % 2]}\n" for n in range(10)) + "x,\n,a\n"
    )
    seen = inspect(path)
    assert seen.facts.num_rows == len(list(read_rows(seen.facts))) == 10
    (finding,) = seen.findings
    assert (finding.code, finding.line, finding.level) == (
        "rows_left_out",
        12,
        "warning",
    ) and "2 rows are" in finding.sentence


def test_labels_that_look_wrong_are_said(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.csv", "text,label\n" + "".join(f"w{n},{'ab'[n % 2]}\n" for n in range(8)) + "x,A\ny,c\ny,c\n"
    )
    found = {finding.code: finding for finding in inspect(path).findings}
    assert found["similar_labels"].line == 10 and "'A' and 'a'" in found["similar_labels"].sentence
    assert found["rare_class"].line == 10 and found["repeated_rows"].level == "note"


def test_what_a_task_needs(tmp_path: Path) -> None:
    def faults(body: str, mapping: dict[str, str] | None = None, holdout: float = 0.15) -> list[str]:
        facts = inspect(write(tmp_path, "a.csv", body), mapping=mapping).facts
        return [
            fault.code for fault in dataset_faults(facts, "classify", ("classification",), ("text", "label"), holdout)
        ]

    many = "text,label\n" + "".join(f"w{n},{'ab'[n % 2]}\n" for n in range(20))
    assert faults(many) == []
    assert faults(many, {"text": "text"}) == ["wrong_shape"]
    assert faults(many, holdout=0.01) == ["no_holdout"]
    assert faults("text,label\n" + "w,a\n" * 20) == ["one_class"]
    assert faults(GOOD) == ["too_few_rows"]
    with pytest.raises(RecipeError, match="There is no column 'topic'"):
        faults(many, {"text": "text", "label": "topic"})
