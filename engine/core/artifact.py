"""Artifacts: immutable results, addressed by their content.

Layout of an artifact folder, written by `engine.train.export`:
    artifact.json          kind, methods and versions, recipe fingerprint, base model, metrics against the baseline, forms, parents
    recipe.yaml            the recipe, complete
    README.md              model card
    adapter/               the adapter in its own or in the peft layout (absent for full fine-tuning)
    lora/                  the exact LoRA form in the peft layout, where one exists
    merged/                a plain model directory that transformers loads
    heldout.json           what each held-out example came to: its row in the data, loss, weight, and whether the answer is right, where that can be said
    reference.safetensors  held-out inputs and the logits of the trained model on them
    certificate.json       what a clean process found when it loaded the export with the official loaders
    manifest.json          {"files": {relative path: {"bytes", "sha256"}}, "id": sha256 over that mapping}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.core.control import write_json
from engine.core.recipe import canonical

MANIFEST, HELDOUT = "manifest.json", "heldout.json"
_OUTSIDE = {MANIFEST, "certificate.json"}  # the certificate is about the content, so it is not part of it


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of an artifact but the manifest and the certificate: relative path -> bytes and sha256."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _OUTSIDE
    }


def seal(folder: Path) -> str:
    """Write the manifest; returns the artifact's id, a hash over all file hashes."""
    files = describe_files(folder)
    identity = hashlib.sha256(canonical(files).encode()).hexdigest()
    write_json(folder / MANIFEST, {"id": identity, "files": files})
    return identity


def damaged_files(folder: Path) -> list[str]:
    """Files that are missing, added or changed since the artifact was sealed."""
    sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    now = describe_files(folder)
    return sorted(name for name in sealed.keys() | now.keys() if sealed.get(name) != now.get(name))
