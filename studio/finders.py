"""Serves the charts' script from the Python package that brings it, so that no copy of it lies in the project."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.contrib.staticfiles.finders import BaseFinder
from django.core.files.storage import FileSystemStorage

NAME = "plotly.min.js"


class PlotlyFinder(BaseFinder):
    """Finds `plotly/plotly.min.js` and nothing else of that package."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spec = find_spec("plotly")
        places = list(spec.submodule_search_locations or []) if spec else []
        self.folder = Path(places[0]) / "package_data" if places else None

    def find(self, path: str, find_all: bool = False, **kwargs: Any) -> Any:
        found = str(self.folder / NAME) if self.folder and path == f"plotly/{NAME}" else ""
        if find_all:
            return [found] if found else []
        return found or None

    def list(self, ignore_patterns: Any) -> Iterator[tuple[str, FileSystemStorage]]:
        if self.folder:
            storage = FileSystemStorage(location=self.folder)
            storage.prefix = "plotly"  # type: ignore[attr-defined]  # read by the collector and by whitenoise
            yield NAME, storage
