"""From a file to batches: looking at it, tokenizing it, and the second launch over the same data."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json
from pyarrow import parquet
from torch import Tensor

from engine.bench.measure import Timing, interleave, ratio_interval
from engine.bench.pages import Goal, Section, Study
from engine.bench.whole_runs import shared_folder
from engine.bench.workbench import Workbench, random_llama
from engine.core.facts import Facts
from engine.core.recipe import DataRef
from engine.io.datasets import inspect
from engine.io.facts import data_facts, machine_facts, model_facts
from engine.ops.pretrain import train_tokenizer
from engine.tasks import cache, task
from engine.tasks.base import Example, Task
from engine.tasks.batching import plain_batch
from engine.tasks.examples import Examples
from engine.tasks.tokens import Tokens, rust_threads
from engine.train.run import set_threads

ROUNDS = 5
VOCABULARY = 16_384
MAP_ROWS = 1000  # of one batch of datasets.map
MAX_BYTES = 3_000_000  # of each corpus
LOOK_BYTES = 90_000_000  # of the files that are looked at
MB = 1e6


def measure() -> list[Section]:
    """Run the study and return its tables."""
    set_threads()
    bench = Workbench()
    try:
        texts = corpora()
        tokenizer = train_tokenizer(texts["prose"][::4] + texts["code"][::4], VOCABULARY)
        return [
            _tokens(texts, tokenizer),
            _launches(bench, texts, tokenizer),
            _looks(bench, texts),
            _batches(texts, tokenizer),
        ]
    finally:
        bench.close()


def corpora() -> dict[str, list[str]]:
    """Real texts: prose and code from Python's own library, and books, requests and other scripts where the public data sets lie."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for path in library.glob("*.py") if path.stat().st_size > 2000)
    code = [piece for path in sources for piece in path.read_text(encoding="utf-8", errors="replace").split("\n\n")]
    prose = (library / "pydoc_data" / "topics.py").read_text(encoding="utf-8").encode().decode("unicode_escape").split("\n\n")  # fmt: skip
    found = {"prose": prose, "code": code}
    shared = shared_folder()
    if shared is not None:
        books = ("domain_novel_bronte", "domain_science_darwin", "domain_gothic_frankenstein")
        found["prose"] = [text for book in books for text in (shared / book / "text.txt").read_text(encoding="utf-8").split("\n\n")]  # fmt: skip
        lines = (shared / "banking77" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        found["requests"] = [json.loads(line)["text"] for line in lines]
        rows = (shared / "udhr_languages_a" / "udhr_a.jsonl").read_text(encoding="utf-8").splitlines()
        found["scripts"] = [part for row in rows for part in json.loads(row)["text"].split("\n")]
    return {name: _bounded([text for text in texts if text.strip()]) for name, texts in found.items()}


def _bounded(texts: Sequence[str]) -> list[str]:
    kept, size = [], 0
    for text in texts:
        size += len(text.encode(errors="replace"))
        if size > MAX_BYTES:
            break
        kept.append(text)
    return kept


def mapped(texts: Sequence[str], tokenizer: Any) -> list[pa.Table]:
    """What datasets.map(batched=True) does at least: the tokenizer called on 1,000 rows, an Arrow table of each answer. It writes to disk besides."""
    tables = []
    for at in range(0, len(texts), MAP_ROWS):
        found = tokenizer(list(texts[at : at + MAP_ROWS]))
        tables.append(pa.table({name: pa.array(found[name], pa.list_(pa.int32() if name == "input_ids" else pa.int8())) for name in found}))  # fmt: skip
    return tables


def _tokens(texts: dict[str, list[str]], tokenizer: Any) -> Section:
    section = Section(
        title="Tokenizing",
        intro=f"Byte-level BPE of {VOCABULARY:,} tokens, trained on a quarter of the prose and the code. Beside it stands what datasets.map(batched=True) does at "
        "least, without its fingerprints and its file: the tokenizer called on 1,000 rows, the answers as an Arrow table. Equal threads, ids compared one by one; "
        f"each time from scratch, nothing is remembered between rounds. {ROUNDS} interleaved rounds.",
        columns=("texts", "MB", "tokens", "ours, MB/s", "map, MB/s", "ratio", "95 % interval"),
    )  # fmt: skip
    everything = {**texts, "all of them": [text for some in texts.values() for text in some]}
    for name, some in everything.items():
        size = sum(len(text.encode()) for text in some) / MB
        found = Tokens(tokenizer).rows(some)
        theirs = np.concatenate([table["input_ids"].combine_chunks().flatten().to_numpy() for table in mapped(some, tokenizer)])  # fmt: skip
        if not np.array_equal(found.flat, theirs):
            raise RuntimeError(f"The ids of '{name}' differ.")
        times = interleave({"ours": _asking(tokenizer, some), "map": _mapping(tokenizer, some)}, rounds=ROUNDS, warm=1)
        value, low, high = ratio_interval(times["map"].seconds, times["ours"].seconds)
        speeds = [f"{size / times[which].median:.1f}" for which in ("ours", "map")]
        section.rows.append(
            (name, f"{size:.1f}", f"{len(found.flat):,}", *speeds, f"{value:.2f}", f"{low:.2f} – {high:.2f}")
        )
        if name == "all of them":
            section.goals.append(
                Goal(number="P10", goal="tokens per second, equal ids", value=value, interval=(low, high), target=1.8, better="more",
                     baseline="batched tokenizer calls with an Arrow table of 1,000 rows each",
                     reason="A word that was never met costs what it always did; texts of rare words gain least.")
            )  # fmt: skip
    return section


def _asking(tokenizer: Any, texts: Sequence[str]) -> Callable[[], Any]:
    return lambda: Tokens(tokenizer).rows(texts)


def _mapping(tokenizer: Any, texts: Sequence[str]) -> Callable[[], Any]:
    def once() -> None:
        with rust_threads():
            mapped(texts, tokenizer)

    return once


def _launches(bench: Workbench, texts: dict[str, list[str]], tokenizer: Any) -> Section:
    section = Section(
        title="First and second launch over the same data",
        intro="From rows in a file to encoded examples, as a run does it: the first time rows are read, tokenized and kept, the second time checked against "
        f"their checksums and mapped. Hashes of the tokenizer's files and of the code are taken anew each time. {ROUNDS} interleaved rounds; files are in memory.",
        columns=("data", "MB", "examples", "first, s", "second, ms", "ratio", "95 % interval", "kept, MB"),
    )
    before = os.environ.get("BONSAI_HOME")
    os.environ["BONSAI_HOME"] = str(bench.folder / "home")
    try:
        everything = [text for some in texts.values() for text in some]
        model = random_llama(bench.folder, hidden=32, layers=1, ffn=32, heads=2)
        tokenizer.save_pretrained(model)  # of the model no more than its tokenizer is used
        cases = [("all texts, continued", _Launch(bench, "causal_lm", everything, model))]
        if "requests" in texts:
            cases.append(("10,003 banking requests, sorted", _Launch(bench, "classify", [], None)))
        for name, launch in cases:
            times = interleave({"first": launch.first, "second": launch.second}, rounds=ROUNDS, warm=1)
            # The variants rotate, so "second" may come first in a round; the entry is there all the same.
            value, low, high = ratio_interval(times["first"].seconds, times["second"].seconds)
            kept = sum(file.stat().st_size for file in cache_folder().rglob("*") if file.is_file())
            section.rows.append(_launch_row(name, launch, times, (value, low, high), kept))
            goal = name.startswith("all texts")
            section.goals.append(
                Goal(number="P10" if goal else "", goal=f"second launch, {name}", value=value, interval=(low, high), target=100.0 if goal else None,
                     better="more", baseline="the first launch of the same commit")
            )  # fmt: skip
    finally:
        os.environ.pop("BONSAI_HOME") if before is None else os.environ.update(BONSAI_HOME=before)
    return section


def cache_folder() -> Path:
    """Where the token cache of this process lies."""
    return Path(os.environ["BONSAI_HOME"]) / "cache" / "tokens"


class _Launch:
    """The encode phase of one recipe, from nothing or from what is kept."""

    def __init__(self, bench: Workbench, name: str, texts: Sequence[str], folder: Path | None) -> None:
        if folder is None:
            shared = shared_folder()
            assert shared is not None
            self.path, source = shared / "banking77" / "train.jsonl", "starter:minilm-l6"
        else:
            self.path, source = bench.folder / "texts.jsonl", f"folder:{folder}"
            self.path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        self.recipe = bench.recipe(source, f"file:{self.path}", [], task=name, max_length=256, holdout=0.1)
        data = data_facts(DataRef(source=f"file:{self.path}"))
        self.facts = Facts(task=name, model=model_facts(source, task=name), data=data, machine=machine_facts())
        self.task: Task = task(name)
        self.tokenizer = self.task.load_tokenizer(self.facts.model)

    def first(self) -> None:
        shutil.rmtree(cache_folder(), ignore_errors=True)
        self.second()

    def second(self) -> None:
        cache.code_digest.cache_clear()
        self.found = cache.encoded_data(self.task, self.tokenizer, self.recipe, self.facts, _never)


def _never(sentence: str) -> None:
    raise RuntimeError(sentence)


def _launch_row(
    name: str, launch: _Launch, times: dict[str, Timing], ratio: tuple[float, float, float], kept: int
) -> tuple[str, ...]:
    number = len(launch.found.train) + len(launch.found.holdout)
    value, low, high = ratio
    return (name, f"{launch.path.stat().st_size / MB:.1f}", f"{number:,}", f"{times['first'].median:.2f}", f"{times['second'].median * 1e3:.1f}",
            f"{value:.0f}", f"{low:.0f} – {high:.0f}", f"{kept / MB:.1f}")  # fmt: skip


def _looks(bench: Workbench, texts: dict[str, list[str]]) -> Section:
    section = Section(
        title="Looking at a file",
        intro="From a file to its facts: every row checked, lengths, labels, repeated rows, checksum. Beside it stands Arrow's parser of the same format on as "
        "many threads, which tells none of that and is the floor. "
        f"Processor seconds are of all threads. {ROUNDS} interleaved rounds; files are in memory.",
        columns=("format", "MB", "ours, MB/s", "ours, CPU s", "parser alone, MB/s"),
    )  # fmt: skip
    for name, path in _looked_at(bench, texts).items():
        ways: dict[str, Callable[[], Any]] = {"ours": _looking(path), "parser": _parsing(path)}
        times = interleave(ways, rounds=ROUNDS, warm=1)
        size = path.stat().st_size / MB
        speeds = {way: f"{size / timing.median:.0f}" for way, timing in times.items()}
        seconds = f"{_processor_seconds(ways['ours']):.2f}"
        section.rows.append((name, f"{size:.1f}", speeds["ours"], seconds, speeds["parser"]))
        value, low, high = ratio_interval([size] * ROUNDS, times["ours"].seconds)
        section.goals.append(
            Goal(number="P9", goal=f"a look at a {name} file", value=value, interval=(low, high), target=400.0, better="more",
                 unit="MB/s", baseline="none", reason=_SLOW_LOOK)
        )  # fmt: skip
    return section


_SLOW_LOOK = (
    "Parsing takes about two fifths of the processor time, hashing each text and counting in columns as much, the checksum a tenth; two processors would have to be "
    "free for it. "
    "What was found is kept, so that it is done once a file."
)


def _looked_at(bench: Workbench, texts: dict[str, list[str]]) -> dict[str, Path]:
    """The same texts, with labels and as conversations, in every format that is counted in columns."""
    everything = [text for some in texts.values() for text in some]
    draw = random.Random(5)
    rows: list[dict[str, str]] = []
    chats: list[dict[str, list[dict[str, str]]]] = []
    size = 0
    while size < LOOK_BYTES:
        text, asked = draw.choice(everything), f"{len(rows)} {draw.choice(everything)[:200]}"
        rows.append({"text": f"{len(rows)} {text}", "label": f"kind {draw.randrange(7)}"})
        chats.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]})
        size += len(text) + 40
    names = {
        "JSON lines": "looked.jsonl",
        "chat JSON lines": "chat.jsonl",
        "CSV": "looked.csv",
        "Parquet": "looked.parquet",
    }
    files = {name: bench.folder / file for name, file in names.items()}
    for name, some in (("JSON lines", rows), ("chat JSON lines", chats)):
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    with files["CSV"].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), files["Parquet"], compression="snappy")
    return files


def _looking(path: Path) -> Callable[[], Any]:
    return lambda: inspect(path)


def _parsing(path: Path) -> Callable[[], Any]:
    """Arrow's parser alone, block after block, so that it needs as little memory."""
    if path.suffix == ".jsonl":
        return lambda: sum(batch.num_rows for batch in arrow_json.open_json(path, read_options=arrow_json.ReadOptions(block_size=4 << 20)))  # fmt: skip
    if path.suffix == ".csv":
        reading, options = arrow_csv.ReadOptions(block_size=4 << 20), arrow_csv.ParseOptions(newlines_in_values=True)
        return lambda: sum(batch.num_rows for batch in arrow_csv.open_csv(path, read_options=reading, parse_options=options))  # fmt: skip
    return lambda: sum(batch.num_rows for batch in parquet.ParquetFile(path).iter_batches(4096))


def _processor_seconds(call: Callable[[], Any]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def _batches(texts: dict[str, list[str]], tokenizer: Any) -> Section:
    ids = Tokens(tokenizer).rows(texts["prose"][:2000]).cut(256)
    arrays = Examples({"input_ids": ids, "labels": ids}, np.arange(len(ids)))
    plain, number = list(arrays), range(0, len(arrays) - 16, 16)

    def ours() -> None:
        for at in number:
            plain_batch(arrays.take(range(at, at + 16)), 0)

    def lists() -> None:
        for at in number:
            _padded_lists(plain[at : at + 16])

    times = interleave({"ours": ours, "lists": lists}, rounds=ROUNDS, warm=1)
    value, low, high = ratio_interval(times["lists"].seconds, times["ours"].seconds)
    each = {name: timing.median / len(number) * 1e6 for name, timing in times.items()}
    return Section(
        title="Laying batches",
        intro="16 examples of prose as padded tensors: from flat arrays, and from lists padded in Python as collators usually do.",
        columns=("from", "microseconds a batch"),
        rows=[("flat arrays", f"{each['ours']:.0f}"), ("lists", f"{each['lists']:.0f}")],
        goals=[Goal(goal="laying a batch", value=value, interval=(low, high), better="more", baseline="lists padded in Python")],
    )  # fmt: skip


def _padded_lists(examples: Sequence[Example]) -> dict[str, Tensor]:
    width = max(map(len, examples))
    return {
        "input_ids": torch.tensor([each.input_ids + [0] * (width - len(each)) for each in examples]),
        "attention_mask": torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in examples]),
        "labels": torch.tensor([each.labels + [-100] * (width - len(each)) for each in examples]),
    }


STUDY = Study(name="data", page="data.md", minutes=1.5, quick=True, seed=5, run=measure)
