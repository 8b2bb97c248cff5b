"""Kept tokens: the second launch is the first, bit for bit, whatever happened to the files in between."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.events import LOG_NAME, read_events
from engine.core.facts import Facts
from engine.core.recipe import Recipe, TrainSettings
from engine.io.tensors import load_tensors
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.tasks import cache, task, tasks
from engine.tasks.base import Encoded, Task
from engine.tasks.cache import TokenCache, encoded_data, entry_name
from tests.engine.tiny import Tiny, events, lay, metric_rows

METHODS: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {})]
FILES = (
    "manifest.json",
    "rows.jsonl",
    "rows.starts.bin",
    "input_ids.flat.bin",
    "input_ids.starts.bin",
    "sources.bin",
    "held.bin",
)
TASKS = ("classify", "causal_lm", "instruct", "verifiable", "preference")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BONSAI_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache" / "tokens"


class Case:
    """What `encoded_data` is asked with."""

    def __init__(self, tiny: Tiny, name: str = "causal_lm", **settings: Any) -> None:
        checked = require(tiny.recipe(METHODS, task=name, **settings))
        assert checked.facts is not None
        self.recipe, self.facts = checked.recipe, checked.facts
        self.task = task(name)
        self.tokenizer = self.task.load_tokenizer(self.facts.model)
        self.said: list[str] = []

    def encoded(self) -> Encoded:
        return encoded_data(self.task, self.tokenizer, self.recipe, self.facts, self.said.append)

    def plain(self) -> Encoded:
        return self.task.encode(list(self.task.rows(self.facts.data)), self.tokenizer, self.recipe, self.facts.data)

    def name(self, **changes: Any) -> str:
        asked = {"task": self.task, "tokenizer": self.tokenizer, "recipe": self.recipe, "facts": self.facts, **changes}
        return entry_name(**asked)


def as_lists(encoded: Encoded) -> dict[str, Any]:
    return {
        "train": [asdict(item) for item in encoded.train],
        "holdout": [asdict(item) for item in encoded.holdout],
        "holdout_rows": list(encoded.holdout_rows),
        "rows": list(encoded.rows),
        "notes": encoded.notes,
        "num_train_tokens": encoded.num_train_tokens,
    }


@pytest.mark.parametrize("name", TASKS)
def test_what_comes_from_the_cache_is_what_was_encoded(
    tiny: Tiny, home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tiny, name)
    plain = as_lists(case.plain())
    assert as_lists(case.encoded()) == plain and len(list(home.iterdir())) == 1
    monkeypatch.setattr(type(case.task), "encode", None)  # the second time nothing is read or tokenized
    monkeypatch.setattr(type(case.task), "rows", None)
    again = case.encoded()
    assert as_lists(again) == plain and not case.said
    assert type(again.train[0]) is case.task.example_type


def test_every_task_is_looked_at() -> None:
    assert set(TASKS) == set(tasks())


@pytest.mark.parametrize("name", TASKS)
def test_encoding_reads_no_setting_beyond_those_of_the_key(tiny: Tiny, name: str) -> None:
    case, asked = Case(tiny, name), set()

    class Watched:
        def __getattr__(self, field: str) -> Any:
            asked.add(field)
            return getattr(case.recipe.settings, field)

    class Asked:
        settings = Watched()

    rows = list(case.task.rows(case.facts.data))
    case.task.encode(rows, case.tokenizer, Asked(), case.facts.data)  # type: ignore[arg-type]
    assert asked <= set(case.task.encoding_settings) <= set(TrainSettings.model_fields)


def test_whatever_decides_the_tokens_is_in_the_key(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tiny, "instruct")
    names = {case.name()}

    def other(**changes: Any) -> None:
        names.add(case.name(**changes))

    def with_settings(**changes: Any) -> Recipe:
        return case.recipe.model_copy(update={"settings": case.recipe.settings.model_copy(update=changes)})

    def with_data(**changes: Any) -> Facts:
        return replace(case.facts, data=replace(case.facts.data, **changes))

    for changes in ({"max_length": 99}, {"packing": False}, {"holdout": 0.3}, {"seed": 12345}):
        other(recipe=with_settings(**changes))
    for changed in ({"sha256": "0" * 64}, {"mapping": {"messages": "other"}}, {"labels": ("a",)}, {"format": "txt"}):
        other(facts=with_data(**changed))
    other(task=task("verifiable"))
    moved = tiny.variant(1)
    assert case.name(facts=replace(case.facts, model=replace(case.facts.model, path=str(moved)))) in names, "other weights, same tokens"  # fmt: skip
    copy = tmp_path / "model"
    copy.mkdir()
    for path in moved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    body = json.loads((copy / "tokenizer.json").read_text())
    body["model"]["merges"] = body["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(body))
    other(facts=replace(case.facts, model=replace(case.facts.model, path=str(copy))))
    template = case.tokenizer.chat_template
    case.tokenizer.chat_template = template + " "
    other()
    case.tokenizer.chat_template = template
    monkeypatch.setattr(cache, "code_digest", lambda: "another version")
    other()
    assert len(names) == 1 + 4 + 4 + 1 + 1 + 1 + 1
    unread = with_settings(learning_rate=0.5, batch_size=2, max_steps=3)
    monkeypatch.undo()
    assert case.name(recipe=unread) == case.name()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_entry_is_made_again_and_said(tiny: Tiny, home: Path, file: str, harm: Any) -> None:
    case = Case(tiny)
    plain = as_lists(case.encoded())
    harm(next(home.iterdir()) / file)
    assert as_lists(case.encoded()) == plain
    assert len(case.said) == 1 and "made again" in case.said[0]
    assert as_lists(case.encoded()) == plain and len(case.said) == 1, "it is whole again"


def test_data_that_change_while_they_are_read_are_not_kept(tiny: Tiny, home: Path, tmp_path: Path) -> None:
    case = Case(tiny)
    path = tmp_path / "moving.jsonl"
    path.write_bytes(Path(case.facts.data.path).read_bytes())
    path.write_text(path.read_text() + json.dumps({"text": "One more."}) + "\n")  # not what the facts were taken from
    case.facts = replace(case.facts, data=replace(case.facts.data, path=str(path)))
    assert len(case.encoded().rows) == case.facts.data.num_rows + 1
    assert not home.exists() or not list(home.iterdir())


def test_the_least_recently_used_goes_first(tiny: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(tiny, seed=seed) for seed in range(4)]
    for age, case in enumerate(cases[:3]):
        case.encoded()
        os.utime(home / case.name() / "manifest.json", (1000 + age, 1000 + age))
    cases[0].encoded()  # used again
    sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in home.iterdir()]
    abandoned = home / ".abandoned.tmp"
    abandoned.mkdir()
    os.utime(abandoned, (1000, 1000))
    monkeypatch.setenv("BONSAI_TOKEN_CACHE_BYTES", str(int(3.5 * max(sizes))))
    cases[3].encoded()
    assert {entry.name for entry in home.iterdir()} == {cases[n].name() for n in (0, 2, 3)}
    assert cases[3].encoded().train[0].input_ids == cases[3].plain().train[0].input_ids


def test_too_large_an_entry_and_a_limit_of_zero_keep_nothing(
    tiny: Tiny, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tiny)
    for limit in ("0", "100"):
        monkeypatch.setenv("BONSAI_TOKEN_CACHE_BYTES", limit)
        assert as_lists(case.encoded()) == as_lists(case.plain())
        assert not home.exists() or not list(home.iterdir())
    monkeypatch.delenv("BONSAI_HOME")
    assert TokenCache.of_environment() is None


def test_a_folder_that_cannot_be_written_stops_no_run(tiny: Tiny, home: Path) -> None:
    case = Case(tiny)
    home.parent.mkdir(parents=True)
    home.write_text("a file where the folder should be")
    assert as_lists(case.encoded()) == as_lists(case.plain())
    assert any("could not be kept" in sentence for sentence in case.said)


def test_what_is_mapped_stays_when_the_entry_goes(tiny: Tiny, home: Path) -> None:
    case = Case(tiny)
    case.encoded()
    mapped, plain = case.encoded(), as_lists(case.plain())
    TokenCache(home)._remove(home / case.name())
    assert not list(home.iterdir()) and as_lists(mapped) == plain


def _store(home: str, name: str, barrier: Any) -> None:
    numbers = np.arange(3)
    examples = cache.Examples({key: cache.Ragged.of([[1, 2], [3], [4, 5]]) for key in ("input_ids", "labels")}, numbers)
    rows = [{"text": str(n)} for n in range(3)]
    encoded = cache.Encoded(train=examples[:2], holdout=examples[2:], holdout_rows=cache.Picked(rows, [2]), rows=rows)
    barrier.wait()
    for _ in range(5):
        assert TokenCache(Path(home)).store(name, encoded, lambda sentence: None)


def test_many_may_keep_the_same_at_once(home: Path) -> None:
    fresh = multiprocessing.get_context("spawn")
    barrier = fresh.Barrier(3)
    writers = [fresh.Process(target=_store, args=(str(home), "entry", barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [path.name for path in home.iterdir()] == ["entry"]
    found = TokenCache(home).load("entry", Task.example_type, pytest.fail)
    assert found is not None and [item.input_ids for item in (*found.train, *found.holdout)] == [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize("name", ["classify", "instruct"])
def test_a_run_from_the_cache_is_the_run_without_one_bit_for_bit(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(METHODS, task=name)
    monkeypatch.delenv("BONSAI_HOME", raising=False)
    folders = []
    for turn in ("without", "first", "second"):
        folders.append(lay(tmp_path / turn, recipe))
        if turn == "second":
            monkeypatch.setattr(type(task(name)), "encode", None)
        result = run_folder(folders[-1])
        assert result["outcome"] == "succeeded", result["message"]
        monkeypatch.setenv("BONSAI_HOME", str(tmp_path / "home"))
    rows, kinds, weights = zip(
        *((metric_rows(folder), told(folder), load_tensors(folder / "artifact" / "merged" / "model.safetensors")) for folder in folders),
        strict=True,
    )  # fmt: skip
    assert rows[0] == rows[1] == rows[2] and rows[0]
    assert kinds[0] == kinds[1] == kinds[2]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


def told(folder: Path) -> list[Any]:
    """Kind and step of every event but those of the clock, with the samples and scores."""
    kinds = [
        (event.kind, event.step)
        for event, _ in read_events(folder / LOG_NAME)
        if event.kind not in {"progress", "metric"}
    ]
    return [*kinds, events(folder, "sample"), events(folder, "log")]
