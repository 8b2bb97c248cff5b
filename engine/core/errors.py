"""Faults and errors: what happened, why, and what to do, in sentences a person can act on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Reason = Literal["bad_input", "out_of_memory", "diverged", "environment", "bug"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong, at one place, with the way out.

    `where` is a dotted path into the recipe or file ("methods[0].params.r", "data.columns.label", "line 12");
    `code` is stable and for machines; the other three are whole sentences for people.
    """

    where: str
    what: str
    why: str
    way_out: str
    code: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.way_out) if part)

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class EngineError(Exception):
    """A run cannot start or go on; `reason` says whose turn it is to act and `fault` says how."""

    def __init__(self, fault: Fault, reason: Reason = "bad_input") -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.reason: Reason = reason


class RecipeError(EngineError):
    """A recipe was refused before any weight was loaded; `faults` holds everything that is wrong, not only the first."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        if not self.faults:
            raise ValueError("A RecipeError needs at least one fault.")
        super().__init__(self.faults[0])

    def __str__(self) -> str:
        return "\n".join(f"{fault.where}: {fault}" for fault in self.faults)


def bad_input(where: str, what: str, why: str, way_out: str, code: str) -> EngineError:
    """An error that the person who wrote the recipe or the file can mend."""
    return EngineError(Fault(where=where, what=what, why=why, way_out=way_out, code=code), "bad_input")
