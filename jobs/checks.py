"""System checks: what would make every run fail, said before the first one starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register

LITTLE = 2 << 30
NOTHING = 200 << 20


@register()
def check_home(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """The data folder can be written."""
    if os.access(settings.BONSAI_HOME, os.W_OK | os.X_OK):
        return []
    return [
        Error(
            f"The data folder {settings.BONSAI_HOME} cannot be written.",
            hint="Give this user the right to write there, or name another folder in BONSAI_HOME.",
            id="jobs.E001",
        )
    ]


@register()
def check_disk(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """The disk has room for checkpoints and results."""
    free = shutil.disk_usage(settings.BONSAI_HOME).free
    if free >= LITTLE:
        return []
    words = f"The disk of the data folder {settings.BONSAI_HOME} has {free / 1e9:.1f} GB free."
    hint = "Free some space, delete old runs, or name a folder on a larger disk in BONSAI_HOME."
    if free < NOTHING:
        return [Error(words, hint=hint, id="jobs.E002")]
    return [Warning(words, hint=hint, id="jobs.W001")]


@register()
def check_forwarding(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """The trackers that are to be sent the curves of runs can be used. Trainings do not depend on it."""
    if not settings.BONSAI_FORWARD:
        return []
    from jobs.forwarding import targets  # only processes of an installation that forwards load it

    return [Warning(what, hint=way_out, id="jobs.W002") for what, way_out in targets()[1]]
