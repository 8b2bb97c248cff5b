"""Tokens by word, in batches and in arrays: the ids of the tokenizer itself, whatever the text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.io.facts import model_facts
from engine.ops.pretrain import train_tokenizer
from engine.starters.corpus import stories
from engine.tasks import task, tokens
from engine.tasks.base import Example
from engine.tasks.batching import IGNORED, bucketed, packed_batch, plain_batch
from engine.tasks.examples import Examples, Ragged, take
from engine.tasks.tokens import Tokens

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level() -> Any:
    return train_tokenizer(stories(3, 60), 600)


def like_llama3() -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def word_pieces() -> Any:
    return task("classify").load_tokenizer(model_facts("starter:minilm-l6", task="classify"))


def sentence_pieces() -> Any:
    """Llama 2's kind: no pre-tokenizer, spaces are written as ▁, unknown characters as bytes."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,'-0123456789ABC"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "th", "▁th", "he", "▁the", "▁▁", "an", "▁an", "in", "er", "▁▁▁▁"]:  # fmt: skip
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("▁", "t"), ("h", "e"), ("t", "h"), ("▁t", "he"), ("▁t", "h"), ("a", "n"), ("▁", "▁"), ("▁", "an"), ("▁▁", "▁▁"), ("i", "n"), ("e", "r")]  # fmt: skip
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level, "like Llama 3": like_llama3, "word pieces": word_pieces, "sentence pieces": sentence_pieces,
}  # fmt: skip
PIECES = st.sampled_from(["the", "The", " ", "  ", "\n", "\n\n", "\t", "fox's", "'s", "ran,", "…", "“Yes”", "naïve", "e\u0301", "\u0308", "狐狸", "ゆき", "👩‍🚀",
                          "\u00a0", "\u2003", "12345", "3.14", "</s>", "<s>", "[MASK]", "[mask]", "▁", "\x1f", "\x00", "\r\n", "don't", "x" * 130])  # fmt: skip
TEXTS = st.lists(st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(max_size=30)), min_size=1, max_size=8)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def listed(ragged: Ragged) -> list[list[int]]:
    return [ragged[place].tolist() for place in range(len(ragged))]


def by_word(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """Tokenizes by word from the first character on, without the look that would notice a difference."""
    monkeypatch.setattr(tokens, "_MIN_CHARS", 0)
    monkeypatch.setattr(tokens, "_NUM_CHECKED", 0)
    monkeypatch.setattr(tokens, "_MAX_NEW", 1.0)
    monkeypatch.setattr(tokens, "_MAX_NEW_LETTERS", 1.0)
    made = Tokens(tokenizer)
    made.rows(["a"])
    assert made._words is not None, "this kind of tokenizer is known"
    return made


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, special=st.booleans())
def test_words_give_the_tokens_of_whole_texts(tokenizer: Any, texts: list[str], special: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = by_word(tokenizer, patch).rows(texts, special=special)
    assert listed(found) == [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def test_words_give_the_tokens_of_real_books(
    tokenizer: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = (shared_data / "domain_gothic_frankenstein" / "text.txt").read_text().split("\n\n")[:600]
    texts += (shared_data / "udhr_languages_a" / "udhr_a.jsonl").read_text().splitlines()
    found = by_word(tokenizer, monkeypatch).rows(texts)
    assert listed(found) == tokenizer(texts)["input_ids"]


def test_a_tokenizer_that_would_differ_is_noticed_and_asked_for_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    monkeypatch.setattr(tokens, "_MIN_CHARS", 0)
    monkeypatch.setattr(tokens, "_state", lambda part: {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False} if part else {})  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = None  # whole texts are one word: merges may cross spaces
    found = Tokens(tokenizer).rows(["the  fox ran \n", "a fox"] * 4)
    assert listed(found) == tokenizer(["the  fox ran \n", "a fox"] * 4)["input_ids"]


def test_a_tokenizer_written_in_python_is_called_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]))

    class Own(transformers.BertTokenizer):  # type: ignore[misc]
        def __call__(self, *given: Any, **more: Any) -> Any:
            found = super().__call__(*given, **more)
            found["input_ids"] = [*found["input_ids"], 4]
            return found

    made = Own(str(tmp_path / "vocab.txt"))
    assert tokens.plain_backend(made) is None
    assert Tokens(made).rows(["the foxes", "fox"])[1].tolist() == made("fox")["input_ids"]


def test_one_letter_a_million_times_takes_linear_time(tokenizer: Any) -> None:
    def seconds(length: int) -> float:
        start = time.process_time()
        Tokens(tokenizer).rows(["a" * length])
        return time.process_time() - start

    seconds(1000)
    assert seconds(1_000_000) < 30 * max(seconds(100_000), 0.005)


# ── arrays ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def same_examples(number: int = 40, seed: int = 2) -> tuple[list[Example], Examples]:
    generator = random.Random(seed)
    plain = []
    for source in range(number):
        ids = [generator.randrange(5, 90) for _ in range(generator.randint(1, 30))]
        plain.append(Example(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :], 3 * source))
    columns = {name: Ragged.of([getattr(item, name) for item in plain]) for name in ("input_ids", "labels")}
    return plain, Examples(columns, np.array([item.source for item in plain]))


def test_arrays_hold_the_same_examples_as_lists() -> None:
    plain, arrays = same_examples()
    assert list(arrays) == plain and arrays[-1] == plain[-1] and list(arrays[3:20:4]) == plain[3:20:4]
    assert list(take(arrays[5:], [4, 0, 4])) == [plain[9], plain[5], plain[9]]
    assert arrays.lengths() == [len(item) for item in plain]
    with pytest.raises(IndexError):
        arrays[40]


@pytest.mark.parametrize("make", [plain_batch, packed_batch])
def test_batches_from_arrays_are_those_from_lists_bit_by_bit(make: Callable[..., dict[str, torch.Tensor]]) -> None:
    plain, arrays = same_examples()
    for batch in bucketed(arrays, list(range(40)), 7):
        one, other = make([plain[at] for at in batch], 0), make(arrays.take(batch), 0)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    assert bucketed(arrays, list(range(40)), 7) == bucketed(plain, list(range(40)), 7)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=12), length=st.integers(1, 5), data=st.data())
def test_ragged_rows_are_taken_cut_and_joined_like_lists(
    rows: list[list[int]], length: int, data: st.DataObject
) -> None:
    ragged = Ragged.of(rows)
    places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    assert listed(ragged) == rows and listed(ragged.cut(length)) == [row[:length] for row in rows]
    assert listed(ragged.take(np.array(places, np.int64))) == [rows[at] for at in places]
    assert listed(Ragged.joined([ragged, ragged])) == rows * 2


def test_a_hub_style_tokenizer_is_recognised(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    texts = [" ".join(stories(4, 3))] * 40
    made = Tokens(tokenizer)
    assert listed(made.rows(texts)) == tokenizer(texts)["input_ids"] and made._words is not None
