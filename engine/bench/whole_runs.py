"""Whole runs in a process of their own, with their peak memory; used by the studies on real data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.measure import ROOT
from engine.core.control import write_json
from engine.core.recipe import parse_recipe
from engine.ops.check import require


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run: its artifact folder, description, certificate, peak resident bytes, and the bytes of its adapter (or merged model)."""

    artifact: Path
    description: dict[str, Any]
    certificate: dict[str, Any]
    peak_bytes: int
    adapter_bytes: int


def shared_folder() -> Path | None:
    """The folder of public data sets that studies read, where there is one; never part of the project."""
    folder = Path(os.environ.get("BONSAI_SHARED_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


def shared_data() -> Path:
    """The folder of public data sets, for studies that are nothing without it."""
    folder = shared_folder()
    if folder is None:
        raise SystemExit("This study reads public data sets: set BONSAI_SHARED_DATA to their folder.")
    return folder


def run_alone(folder: Path, recipe: dict[str, Any]) -> Finished:
    """Check and run a recipe in a fresh process and read what it left."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", require(parse_recipe(recipe)).recipe.model_dump(mode="json"))
    with (folder / "child.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "run", str(folder)], cwd=ROOT, stdout=output, stderr=output
        )
        _, _, usage = os.wait4(process.pid, 0)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["outcome"] != "succeeded":
        raise RuntimeError(result["message"])
    artifact = folder / "artifact"
    home = artifact / "adapter" if (artifact / "adapter").exists() else artifact / "merged"
    return Finished(
        artifact=artifact,
        description=json.loads((artifact / "artifact.json").read_text(encoding="utf-8")),
        certificate=json.loads((artifact / "certificate.json").read_text(encoding="utf-8")),
        peak_bytes=usage.ru_maxrss * 1024,
        adapter_bytes=sum(path.stat().st_size for path in home.glob("*.safetensors")),
    )
