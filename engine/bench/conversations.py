"""Our loop against transformers' Trainer on conversations of every length, where padding and needless logits cost most."""

from __future__ import annotations

from engine.bench.efficiency import conversations
from engine.bench.pages import Section, Study
from engine.bench.workbench import Workbench
from engine.train.run import set_threads


def measure() -> list[Section]:
    """Run the study and return its tables."""
    set_threads()
    bench = Workbench()
    try:
        return [conversations(bench)]
    finally:
        bench.close()


STUDY = Study(name="conversations", page="conversations.md", minutes=2, quick=True, seed=17, run=measure)
