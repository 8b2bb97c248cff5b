"""Where a thing lies on disk. Only identifiers of our own making become part of a path."""

from __future__ import annotations

import uuid
from pathlib import Path

from django.conf import settings


def home() -> Path:
    """The data folder of this installation."""
    return Path(settings.BONSAI_HOME)


def job_folder(job_id: uuid.UUID) -> Path:
    """What one job reads and writes."""
    return home() / "jobs" / str(job_id)


def wake_folder() -> Path:
    """Sockets of everyone who wants to be woken."""
    return home() / "wake"


def engine_socket() -> Path:
    """Where the engine service listens."""
    return Path(settings.BONSAI_ENGINE_SOCKET or home() / "engine.sock")


def catalogue_file() -> Path:
    """What the engine knows, as it told last."""
    return home() / "catalogue.json"


def made_of(sha256: str) -> list[Path]:
    """What the engine keeps of data with this checksum: encoded, and looked at."""
    return list((home() / "cache").glob(f"*/{sha256[:24]}-*"))
