"""The small vectors of a model: gains and offsets of norms, and offsets of other layers, found by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

VectorParts = Literal["both", "norms", "biases"]
_NORM = re.compile(r"norm|(^|\.)ln(_\w+)?$")  # of the module's own name


def vectors(tensors: Mapping[str, tuple[int, ...]], parts: VectorParts) -> list[str]:
    """The names of the vectors of the chosen kind, in the order of the model; the offset of a norm counts as norm."""
    found = []
    for name, shape in tensors.items():
        module, _, leaf = name.rpartition(".")
        if len(shape) != 1:
            continue
        norm = bool(_NORM.search(module.rpartition(".")[2].lower()))
        if (norm and parts in {"both", "norms"}) or (not norm and leaf == "bias" and parts in {"both", "biases"}):
            found.append(name)
    return found
