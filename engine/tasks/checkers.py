"""Final answers: find the one in a text, and compare it with the reference. Texts are only ever compared; nothing in them is run."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Kind = Literal["number", "letter", "text"]

_MARK = re.compile(r"####[ \t]*(.*)")
_SAID = re.compile(
    r"(?:\bfinal answer|\banswer|\bresult|^[ \t]*A)[ \t]*(?:\bis\b|=|:)[ \t]*:?[ \t]*(.*)", re.IGNORECASE | re.MULTILINE
)
# 1,234.5  1234  .5  3/4  1e-3; a sign counts only where no digit or closing bracket stands before it, so that "7-3" holds 7 and 3.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-−+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.(?=\d)|(?<![\d.])\.(?=\d))?\d*(?:[eE][-+]?\d{1,3}(?!\d))?(?:\s?/\s?\d+)?"
)
_WHOLE_NUMBER = re.compile(
    r"[^\w.+−-]{0,3}(?P<number>[-−+]?[$€£]?\s?[-−+]?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][-+]?\d{1,3})?(?:\s?/\s?\d+)?)\s?(?P<unit>[%$€£°]?|[A-Za-z²³]{1,12})[.!]?"
)
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_BRACKETED = re.compile(r"\(([A-Z])\)|\b([B-HJ-Z])\b|\b([AI])(?=[).:]|\s*$)")
_MAX_DIGITS = 60


@dataclass(frozen=True)
class Reference:
    """The answer to compare with: what kind it is, and its comparable form (a fraction, a capital letter, or plain words)."""

    kind: Kind
    value: Fraction | str

    def __str__(self) -> str:
        return str(self.value)


def reference_of(answer: str) -> Reference:
    """Read the reference answer: what stands behind "####", in a box, or else the whole text."""
    final = (_marked(answer) or _boxed(answer) or answer).strip()
    number = as_number(final)
    if number is not None:
        return Reference("number", number)
    letter = _LETTER.fullmatch(final)
    if letter is not None:
        return Reference("letter", letter[1].upper())
    return Reference("text", as_words(final))


def extract(text: str, kind: Kind) -> str:
    """The final answer that a text gives: behind the last "####", in the last box, behind "the answer is", or else the last number, letter or line."""
    said = _marked(text) or _boxed(text) or _said(text)
    if kind == "number":
        found = numbers_in(said or text)
        # Behind a mark the first number is the answer ("#### 18 eggs for 6 people"); in free text it is the last.
        return (found[0] if said else found[-1]) if found else ""
    if kind == "letter":
        if said:
            first = _LETTER.match(said.strip())
            return first[1].upper() if first and not said.strip()[first.end() :][:1].isalnum() else ""
        whole = _LETTER.fullmatch(text.strip())
        if whole is not None:
            return whole[1].upper()
        letters = [next(filter(None, match.groups())) for match in _BRACKETED.finditer(text)]
        return letters[-1] if letters else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return said or (lines[-1].strip() if lines else "")


def is_right(text: str, reference: Reference) -> bool:
    """Whether a text ends in the reference answer."""
    if reference.kind == "number":
        return as_number(extract(text, "number")) == reference.value
    if reference.kind == "letter":
        return extract(text, "letter") == reference.value
    return bool(reference.value) and reference.value in {as_words(extract(text, "text")), as_words(text)}


def gives_away(hint: str, reference: Reference) -> bool:
    """Whether a hint already holds the answer, so that repeating it would count as solving."""
    if reference.kind == "number":
        return any(as_number(found) == reference.value for found in numbers_in(hint))
    if reference.kind == "letter":
        return extract(hint, "letter") == reference.value
    words, answer = as_words(hint), str(reference.value)
    return bool(answer) and f" {answer} " in f" {words} "


def numbers_in(text: str) -> list[str]:
    """Every number in a text, as it is written, from left to right."""
    found = (match.group() for match in _NUMBER.finditer(text))
    return [number for number in found if any(sign.isdigit() for sign in number)]


def as_number(text: str) -> Fraction | None:
    """The exact value of "1,234", "$18", "3/4", "-0.50", "1e3" or "25 %"; None when the text is no single number. A unit behind it is passed over."""
    match = _WHOLE_NUMBER.fullmatch(unicodedata.normalize("NFKC", text).strip().strip("*_`"))
    if match is None or len(text) > _MAX_DIGITS:
        return None
    plain = re.sub(r"[,\s$€£]", "", match["number"].replace("−", "-").replace("⁄", "/"))
    upper, _, lower = plain.partition("/")
    try:
        return Fraction(upper) / (Fraction(lower) if lower else 1)
    except (ValueError, ZeroDivisionError):
        return None


def as_words(text: str) -> str:
    """Lower-case words without punctuation at their edges, single spaces: two texts that differ only there count as equal."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    stripped = (word.strip(".,;:!?\"'`*_()[]{}“”‘’$") for word in words)
    return " ".join(word for word in stripped if word)


def _marked(text: str) -> str:
    found = _MARK.findall(text)
    return str(found[-1]).strip() if found else ""


def _said(text: str) -> str:
    found = [match[1].strip() for match in _SAID.finditer(text)]
    return str(found[-1]) if found else ""


def _boxed(text: str) -> str:
    r"""The content of the last \boxed{…}, with braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            if depth == 0:
                return text[begin:place].strip()
            depth -= 1
    return ""
