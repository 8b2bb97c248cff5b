"""Pieces of what an engine leaves, written by the engine's own code; no Django here, for children use it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.core.artifact import seal


def metric_row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "samples": 8 * step,
        "tokens": 100 * step,
        "epoch": step / 50,
        "loss": 2.0 / step,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "seconds": step / 10,
        "tokens_per_second": 1000.0,
        "memory": 1 << 20,
        **values,
    }


def artifact_in(folder: Path) -> None:
    """An artifact folder as the engine leaves it, by the engine's own code."""
    place = folder / "artifact"
    place.mkdir(parents=True)
    (place / "artifact.json").write_text(json.dumps({"kind": "model", "name": "A run"}))
    (place / "certificate.json").write_text(json.dumps({"ok": True}))
    seal(place)
