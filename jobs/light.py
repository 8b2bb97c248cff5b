"""Keeps a process small: libraries that another library loads merely because they are installed stay out of memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import cast


@contextlib.contextmanager
def absent(*names: str) -> Iterator[None]:
    """Inside, these modules cannot be imported, and whoever can do without them does. What is loaded already stays."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = cast(ModuleType, None)  # so the import system marks what must not be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def unopened(package: str, folder: Path) -> Iterator[None]:
    """Inside, single modules of a package are found in its folder without what the package itself would load first."""
    if package in sys.modules:
        yield
        return
    stand_in = ModuleType(package)
    stand_in.__path__ = [str(folder)]
    sys.modules[package] = stand_in
    try:
        yield
    finally:
        del sys.modules[package]  # whoever asks for the package now gets it whole
        parent, _, name = package.rpartition(".")
        if getattr(sys.modules.get(parent), name, None) is stand_in:
            delattr(sys.modules[parent], name)
