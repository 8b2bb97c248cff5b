"""Starter data that comes with Bonsai, so that a first run needs no upload."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from engine.starters.corpus import dialogues, stories

__all__ = ["STARTER_DATA", "StarterData", "UnknownStarterData", "dialogues", "general_texts", "starter_data", "stories"]

Shape = Literal["classification", "messages", "preferences"]

_FOLDER = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True, kw_only=True)
class StarterData:
    """One data set that comes with Bonsai: where it lies and which of its columns mean what."""

    name: str
    title: str
    path: Path
    shape: Shape
    columns: Mapping[str, str]
    about: str


class UnknownStarterData(ValueError):
    """There is no starter data of this name."""


def _read_manifest(folder: Path) -> dict[str, StarterData]:
    """Read the manifest beside the data files; a fault in it is a fault of the package, so it is raised at import."""
    found: dict[str, StarterData] = {}
    for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8")):
        path = folder / entry["file"]
        if entry["shape"] not in get_args(Shape):
            raise ValueError(
                f"The starter data '{entry['name']}' states the shape '{entry['shape']}', which is unknown."
            )
        if not path.is_file():
            raise ValueError(f"The starter data '{entry['name']}' names the file {entry['file']}, which is missing.")
        found[entry["name"]] = StarterData(
            name=entry["name"],
            title=entry["title"],
            path=path,
            shape=entry["shape"],
            columns=MappingProxyType(dict(entry["columns"])),
            about=entry["about"],
        )
    return found


STARTER_DATA: Mapping[str, StarterData] = MappingProxyType(_read_manifest(_FOLDER))


def starter_data(name: str) -> StarterData:
    """Find starter data by its name, or say in a sentence which names exist."""
    try:
        return STARTER_DATA[name]
    except KeyError:
        known = ", ".join(STARTER_DATA)
        raise UnknownStarterData(
            f"There is no starter data named '{name}'. Bonsai comes with {known}; pick one of these or upload a file."
        ) from None


@functools.cache
def general_texts() -> tuple[str, ...]:
    """Short plain-English paragraphs about everything: the fixed set on which the forgetting meter scores language models."""
    text = (_FOLDER / "general.txt").read_text(encoding="utf-8")
    return tuple(piece.strip() for piece in text.split("\n\n") if piece.strip())
