"""Fixtures for tests of the engine."""

from __future__ import annotations

import pytest

from tests.engine.tiny import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))
