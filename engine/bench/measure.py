"""Fair measuring: variants interleaved in one process, medians with bootstrap intervals. Free of torch, so that the web's studies share it."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call of one variant over all rounds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def interleave(
    variants: dict[str, Callable[[], Any]], *, rounds: int, warm: int = 2, calls: int = 1
) -> dict[str, Timing]:
    """Time every variant once a round, in an order that rotates, after `warm` untimed calls each."""
    for action in variants.values():
        for _ in range(warm):
            action()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(calls):
                variants[name]()
            _wait_for_device()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(name=name, seconds=tuple(values)) for name, values in seconds.items()}


def _wait_for_device() -> None:
    """What was launched on a GPU is over; nothing where torch is not in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio_interval(
    top: Sequence[float], bottom: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Median ratio top/bottom with its 95 % bootstrap interval over rounds (paired)."""
    pairs = list(zip(top, bottom, strict=True))
    rng = random.Random(seed)
    medians = sorted(statistics.median(a / b for a, b in rng.choices(pairs, k=len(pairs))) for _ in range(draws))
    return statistics.median(a / b for a, b in pairs), medians[int(draws * 0.025)], medians[int(draws * 0.975)]


def machine() -> str:
    """One line about the hardware and the versions."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    torch = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""
    threads = f"{torch.get_num_threads()} threads, " if torch is not None else ""
    return (
        f"{cpu}, {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, torch {metadata.version('torch')}; "
        f"{threads}OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    )


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", "engine", "jobs", "studio") else ""
    )


def load_average() -> str:
    """The load of the last minute, as text."""
    return f"{os.getloadavg()[0]:.1f}"
