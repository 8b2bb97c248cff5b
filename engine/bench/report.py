"""The engine's studies, for its command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.bench.pages import Study, run_studies, studies_in


def studies() -> dict[str, Study]:
    """Every study found in engine/bench."""
    import engine.bench

    return studies_in(engine.bench)


def list_studies() -> int:
    """Print what there is as one JSON line, {name: whether `make bench` runs it}; returns an exit code."""
    print(json.dumps({study.name: study.quick for study in studies().values()}))
    return 0


def run_named(names: Sequence[str]) -> int:
    """Run the named studies, or the quick ones; returns an exit code."""
    known = studies()
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"There is no benchmark called {unknown[0]}. Choose from: {', '.join(known)}.")
        return 2
    run_studies(known, names or [study.name for study in known.values() if study.quick])
    return 0
