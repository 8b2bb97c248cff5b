"""Places where one job can run: every GPU of this machine, or its processor. Asks the driver, never torch."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

import psutil
from django.utils import timezone

from jobs.models import Device


@dataclass(frozen=True)
class Place:
    """One device as the machine describes it."""

    name: str
    title: str
    memory_bytes: int


@functools.cache
def places() -> tuple[Place, ...]:
    """The devices of this machine. BONSAI_WORKER gives them a prefix where several machines share one database."""
    prefix = os.environ.get("BONSAI_WORKER", "")
    found = _gpus() or [Place("cpu", platform.processor() or platform.machine(), psutil.virtual_memory().total)]
    return tuple(
        Place(f"{prefix}/{place.name}" if prefix else place.name, place.title, place.memory_bytes) for place in found
    )


def register() -> None:
    """Write down which devices this machine has; whether one is used is for the administrator to say."""
    for place in places():
        values = {"title": place.title, "memory_bytes": place.memory_bytes, "seen": timezone.now()}
        Device.objects.update_or_create(name=place.name, defaults=values)


def gpu_index(name: str) -> str | None:
    """The number of the GPU that a device name means, or None for the processor."""
    _, found, index = name.rpartition("cuda:")
    return index if found else None


def _gpus() -> list[Place]:
    import pynvml  # a megabyte that only a worker needs

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            title = pynvml.nvmlDeviceGetName(handle)
            found.append(Place(f"cuda:{index}", str(title), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)))
        return found
    finally:
        pynvml.nvmlShutdown()
