"""Texts as tokens, many at once: the tokenizer's own Rust code on large batches, and each word only once where words provably do not touch each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers

from engine.tasks.examples import Ints, Places, Ragged

AT_A_TIME = 4096  # texts whose encodings are in memory together
_MIN_CHARS = 50_000  # below, looking at the tokenizer's parts costs more than words that come again save
_MAX_WORDS = 400_000  # remembered
_MAX_NEW, _MAX_NEW_LETTERS = (
    0.3,
    0.12,
)  # share of new words up to which words are faster than whole texts; the second with merges across spaces
_NUM_LEARNING = 2
_NUM_CHECKED = 16  # texts of a call that are tokenized both ways
_ODD = re.compile(r"(?:^|\s) ")
_CUT = re.compile(r"(?<=\S)(?= )")
# A piece ends before a space that no white space precedes, or behind ASCII letters and digits that an ASCII character follows.
_PIECES = re.compile(
    r"\s*[^\s0-9A-Za-z]+(?= )"
    r"|[^0-9A-Za-z]*[0-9A-Za-z]+(?:[^\x00-\x7f][^\s0-9A-Za-z]*(?:[^\S ]\s*[^\s0-9A-Za-z]*)*(?:[0-9A-Za-z]+|(?= )|\Z))*"
    r"|[^0-9A-Za-z]+\Z"
)
_NOTHING = r"(?!)"
_CONTROLS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"  # BERT removes them before it looks for words
_ENDS = r"^ | $|[▁\x1f]"  # a space on its own, what stands for one, and our mark
_GROUP = 64  # words that the Rust tokenizer gets as one text
_MARK = "\x1f"
_HEAD, _TAIL = 0, 1
# The patterns of GPT-2; of Llama 3 and cl100k; of Qwen 2. See `_words_of` for what is used of them.
_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_pool_owner: list[int] = []  # the process whose Rust threads have started; they do not survive a fork


class Tokens:
    """Tokenizes for one pass over the data and remembers the words it has met. The ids are those of `tokenizer(text)`, token for token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._words: _Words | None = None
        self._looked = False

    def rows(self, texts: Sequence[str], *, special: bool = True) -> Ragged:
        """The ids of every text; `special` adds the tokenizer's own marks around them."""
        backend = plain_backend(self.tokenizer)
        if backend is None:
            rows = [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
            return Ragged.of(rows)
        if not self._looked and sum(map(len, texts)) >= _MIN_CHARS:
            self._looked, self._words = True, _words_of(self.tokenizer, backend)
        pieces = [texts[at : at + AT_A_TIME] for at in range(0, len(texts), AT_A_TIME)]
        whole = len(pieces)
        return Ragged.joined([self._piece(backend, piece, special, at, whole) for at, piece in enumerate(pieces)])

    def _piece(self, backend: Any, texts: Sequence[str], special: bool, at: int, num_pieces: int) -> Ragged:
        # New words pay for themselves in the pieces to come, as long as there are some and they bring old words.
        pays = at < min(_NUM_LEARNING, num_pieces - 1)
        found = self._words.rows(texts, special, pays) if self._words is not None else None
        if found is None:
            return encoded_batch(backend, texts, special)
        if at == 0:
            few = encoded_batch(backend, texts[:_NUM_CHECKED], special)
            end = int(few.starts[-1])
            same = np.array_equal(found.starts[: len(few) + 1], few.starts) and np.array_equal(found.flat[:end], few.flat)  # fmt: skip
            if not same:  # a tokenizer of a kind that was not foreseen
                self._words = None
                return encoded_batch(backend, texts, special)
        return found


def plain_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer below, without truncation and padding, when calling the Python one would do nothing besides; otherwise None."""
    base = transformers.PreTrainedTokenizerFast
    own = type(tokenizer)
    if (
        not isinstance(tokenizer, base)
        or own.__call__ is not base.__call__
        or own._encode_plus is not base._encode_plus
    ):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def encoded_batch(backend: Any, texts: Sequence[str], special: bool) -> Ragged:
    """The ids of every text, in one call of the Rust tokenizer with the threads of the job."""
    with rust_threads():
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special)
    return Ragged.of([encoding.ids for encoding in encodings])


def with_offsets(texts: Sequence[str], tokenizer: Any) -> list[tuple[Ints, Places]]:
    """(ids [n], offsets [n, 2] in characters) of every text, without marks."""
    backend = plain_backend(tokenizer)
    if backend is None:
        called = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True) if texts else {}
        pairs = zip(called.get("input_ids", ()), called.get("offset_mapping", ()), strict=True)
        return [(np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)) for ids, offsets in pairs]
    with rust_threads():
        encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [(np.array(one.ids, np.int32), _offsets(one)) for one in encodings]


def _offsets(encoding: Any) -> Places:
    return np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2)


@contextlib.contextmanager
def rust_threads() -> Iterator[None]:
    """Let the Rust tokenizer use as many threads as the job has. Its pool does not survive a fork, so a fork of a process with a pool stays alone."""
    number = torch.get_num_threads()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if number > 1 and (not _pool_owner or _pool_owner[0] == os.getpid()):
        if not _pool_owner:
            _pool_owner.append(os.getpid())
            os.environ["RAYON_NUM_THREADS"] = str(number)  # read once, when the pool starts
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


class _Words:
    """Tokenizes words instead of texts. A text is cut where its tokens are those of the pieces, one behind another; pieces come again and again."""

    def __init__(
        self, backend: Any, added: Sequence[str], *, adds_space: bool = False, refused: str = _NOTHING
    ) -> None:
        self.backend = backend
        self._refused = re.compile(refused)  # texts with these characters are not cut
        self.adds_space = (
            adds_space  # the tokenizer itself puts a space before a text, so pieces are given to it without theirs
        )
        self._firsts = "".join({content[0] for content in added if content})
        contents = sorted(filter(None, added), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, contents)) or _NOTHING})")
        ids, whole = (list(backend.encode("a", add_special_tokens=marked).ids) for marked in (False, True))
        at = next(n for n in range(len(whole) - len(ids) + 1) if whole[n : n + len(ids)] == ids)
        self._marks = Ragged.of([whole[:at], whole[at + len(ids) :]])
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str | int, int] = {_HEAD: _HEAD, _TAIL: _TAIL}  # word -> row of what is known
        self._known = self._marks

    def rows(self, texts: Sequence[str], special: bool, pays: bool) -> Ragged | None:
        """The ids of every text; None when too many of their words are new, unless learning them pays later."""
        words: list[str | int] = []
        ends: list[int] = []
        uncut: list[str] = []
        for text in texts:
            if special:
                words.append(_HEAD)
            pieces = self._pieces(text)
            if pieces is None:
                uncut.append(text)
                pieces = [-len(uncut)]
            words += pieces
            if special:
                words.append(_TAIL)
            ends.append(len(words))
        if len(self._places) > _MAX_WORDS:
            self._forget()
        new = [word for word in dict.fromkeys(words) if word not in self._places and isinstance(word, str)]
        if not pays and len(new) > (_MAX_NEW_LETTERS if self.adds_space else _MAX_NEW) * len(words):
            return None
        self._learn(new)
        count, known = len(self._known), self._known
        if uncut:
            known = Ragged.joined([known, encoded_batch(self.backend, uncut, False)])
        self._places.update({-number: count + number - 1 for number in range(1, len(uncut) + 1)})
        found = known.take(np.fromiter(map(self._places.__getitem__, words), np.int64, len(words)))
        return Ragged(found.flat, found.starts[[0, *ends]])

    def _pieces(self, text: str) -> Sequence[str | int] | None:
        """The words of a text; None when it must stay whole."""
        if self._refused.search(text):
            return None
        if not any(first in text for first in self._firsts) or not self._added.search(text):
            return self._cut(text)
        if self.adds_space:
            return None
        parts = enumerate(
            self._added.split(text)
        )  # every other one is an added token, and between two of them is a text of its own
        return [piece for number, part in parts for piece in ([part] if number % 2 else self._cut(part))]

    def _cut(self, text: str) -> list[str]:
        if not self.adds_space:
            return _PIECES.findall(text)
        return _CUT.split(text) if _ODD.search(text) else text.replace(" ", f"{_MARK} ").split(_MARK)

    def _learn(self, new: Sequence[str]) -> None:
        """Tokenize new words, each by itself: the Rust tokenizer takes many as one text that is already cut."""
        given = [word[1:] if self.adds_space and word.startswith(" ") else word for word in new]
        groups = [given[at : at + _GROUP] for at in range(0, len(given), _GROUP)]
        learned = [self._known]
        for at in range(0, len(groups), AT_A_TIME):
            some = groups[at : at + AT_A_TIME]
            with rust_threads():
                found = self.backend.encode_batch(some, is_pretokenized=True, add_special_tokens=False)
            for group, one in zip(some, found, strict=True):
                owners = np.array(one.word_ids, np.int64)  # which word each token belongs to
                cuts = np.searchsorted(owners, np.arange(len(group) + 1))
                learned.append(Ragged(np.array(one.ids, np.int32), cuts))
        self._places.update(zip(new, range(len(self._known), len(self._known) + len(new)), strict=True))
        self._known = Ragged.joined(learned)


def _words_of(tokenizer: Any, backend: Any) -> _Words | None:
    """How texts may be cut before this tokenizer sees them; None where it cannot be proved that the tokens stay the same.

    BERT: white space and ASCII punctuation end a word, and its normalization looks at one character at a time. Byte-level: in the known patterns no match
    goes on from an ASCII letter or digit to any other ASCII character, nor from what is no white space to a space, and what comes before a place decides
    nothing about the matches behind it. SentencePiece BPE without pre-tokenizer: when no token of the vocabulary holds a space behind another character,
    no merge can join what stands on the two sides of it.
    """
    added = list(tokenizer.added_tokens_decoder.values())
    odd = any(token.lstrip or token.rstrip or token.single_word for token in added)
    model, normalizer, splitter = backend.model, _state(backend.normalizer), _state(backend.pre_tokenizer)
    contents, kind = [token.content for token in added], type(model).__name__
    if odd or tokenizer.split_special_tokens or getattr(model, "dropout", None):
        return None
    if splitter.get("type") == "BertPreTokenizer" and normalizer.get("type") in {None, "BertNormalizer"}:
        if any(token.normalized for token in added):
            return None
        return _Words(backend, contents, refused=_CONTROLS)
    if normalizer.get("type") in {None, "NFC"} and _is_byte_level(splitter):
        if normalizer and any(token.normalized for token in added):
            return None
        return _Words(backend, contents)
    if kind == "BPE" and not splitter and _prepends(normalizer) and not any(token.normalized for token in added):
        vocabulary = backend.get_vocab(with_added_tokens=False)
        joined = any(re.search(r"[^▁]▁", token) for token in vocabulary)
        complete = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        if not joined and complete:
            return _Words(backend, contents, adds_space=True, refused=_ENDS)
    return None


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.__getstate__()) if part is not None else {}
    return found


def _is_byte_level(splitter: Mapping[str, Any]) -> bool:
    parts = splitter.get("pretokenizers", [splitter])
    known = False
    for part in parts:
        if part.get("type") == "ByteLevel":
            known = known or bool(part["use_regex"])
            if part["add_prefix_space"]:
                return False
        elif part.get("type") == "Split":
            if part["pattern"].get("Regex") not in _PATTERNS or part["behavior"] != "Isolated" or part["invert"]:
                return False
            known = True
        elif part.get("type") != "Digits":
            return False
    return known


def _prepends(normalizer: Mapping[str, Any]) -> bool:
    """Whether the normalizer does no more than write spaces as ▁, with one before the text."""
    steps = normalizer.get("normalizers", [])
    return steps == [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
