"""Keeps a process small: libraries that another library loads merely because they are installed stay out of memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
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
