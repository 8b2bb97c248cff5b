"""Safetensors headers read without torch: names, types and shapes of the tensors in a file, checked against the file's size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
}
MAX_HEADER_BYTES = 100_000_000


class UnreadableHeader(ValueError):
    """A file that is not a complete safetensors file; its text is a sentence."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the data area
    end: int

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name; raises UnreadableHeader when the file is damaged, cut short or something else."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UnreadableHeader(f"{path.name} is not a complete safetensors file.")
        raw = file.read(length)
    try:
        body: dict[str, Any] = json.loads(raw)
        found = {
            name: TensorInfo(
                item["dtype"],
                tuple(int(n) for n in item["shape"]),
                int(item["data_offsets"][0]),
                int(item["data_offsets"][1]),
            )
            for name, item in body.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UnreadableHeader(f"The header of {path.name} is damaged.") from error
    for name, info in found.items():
        width = ITEM_BYTES.get(info.dtype)
        if min((*info.shape, info.begin)) < 0 or (
            width is not None and info.end - info.begin != width * prod(info.shape)
        ):
            raise UnreadableHeader(f"The header of {path.name} describes the tensor {name} wrongly.")
    last = max((info.end for info in found.values()), default=0)
    if 8 + length + last != size:
        raise UnreadableHeader(
            f"{path.name} should be {8 + length + last:,} bytes long and is {size:,}: it was cut short or damaged."
        )
    return found
