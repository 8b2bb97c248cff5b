"""Benchmarks and studies: measured side by side in one process, written to docs/benchmarks with command, commit, hardware and seed."""

from __future__ import annotations

from engine.bench.report import ALL

__all__ = ["ALL", "main"]


def main(names: list[str]) -> int:
    """Run the named benchmarks, or the quick ones when none is named; returns an exit code."""
    from engine.bench.report import run_named

    return run_named(names)
