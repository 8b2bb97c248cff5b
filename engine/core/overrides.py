"""Overrides: what a person decides about one trial of a search while it runs, whatever the search's own rule says. No torch.

Whoever decides appends a line to `overrides.jsonl` in the job's folder: {"number": n, "trial": 3, "verdict": "keep" | "stop", "by": name}. Lines are never
changed, numbers grow by one, and of several about one trial the last counts. The search looks at the file between two slices, writes what it takes up into
its record, at the place where it took it up, and tells the log of it; so a search that was interrupted takes the same up at the same place. A trial that
learns while it is to be stopped ends its slice at the next step border.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engine.core.control import Control, Request

OVERRIDES_NAME = "overrides.jsonl"
KeepOrStop = Literal["keep", "stop"]
VERDICTS: tuple[KeepOrStop, ...] = ("keep", "stop")


@dataclass(frozen=True, kw_only=True)
class Override:
    """One decision of a person. number: its place among all that were made in this search, from 1."""

    number: int
    trial: int
    verdict: KeepOrStop
    by: str

    @property
    def sentence(self) -> str:
        """For the log, when it is taken up."""
        if self.verdict == "keep":
            return f"Trial {self.trial} is kept by you ({self.by}): it goes on at the next opportunity."
        return f"Trial {self.trial} is stopped by you ({self.by})."

    @property
    def too_late(self) -> str:
        """For the log, when the trial had ended before it could be taken up."""
        asked = "kept" if self.verdict == "keep" else "stopped"
        return f"Trial {self.trial} could not be {asked} by you ({self.by}) any more: it had ended before."


def write_override(folder: Path, trial: int, verdict: KeepOrStop, by: str) -> Override:
    """Leave a decision for the search that works in `folder`; several people may do so at once."""
    with (folder / OVERRIDES_NAME).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known, end = _parsed(folder)
        file.truncate(end)  # a line torn by a crash was never a decision
        made = Override(number=len(known) + 1, trial=trial, verdict=verdict, by=by)
        file.write(json.dumps(asdict(made), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return made


def read_overrides(folder: Path) -> list[Override]:
    """Every decision so far, the oldest first; a torn last line is left for the next look."""
    return _parsed(folder)[0]


def _parsed(folder: Path) -> tuple[list[Override], int]:
    """(decisions, byte behind the last whole line)."""
    try:
        raw = (folder / OVERRIDES_NAME).read_bytes()
    except FileNotFoundError:
        return [], 0
    end = raw.rfind(b"\n") + 1
    return [Override(**json.loads(line)) for line in raw[:end].splitlines()], end


class SliceControl(Control):
    """The control of one slice: the requests of the whole job, and the wish of a person to stop this very trial, which pauses it at the next step.

    taken: the numbers of the decisions that the search has taken up already.
    """

    def __init__(self, outer: Control, trial: int, taken: Collection[int]) -> None:
        super().__init__(outer.path.parent)
        self.outer, self.trial, self.taken = outer, trial, taken
        self.cut = False  # whether it was this that ended the slice
        self._seen: tuple[int, int] | None = None

    def poll(self) -> Request | None:
        """The newest request of the job not yet obeyed, or "pause" when this trial is to be stopped."""
        request = self.outer.poll()
        if request is not None:
            return request
        folder = self.path.parent
        try:
            stat = (folder / OVERRIDES_NAME).stat()
        except FileNotFoundError:
            return None
        if self._seen == (stat.st_mtime_ns, stat.st_size):
            return None
        self._seen = stat.st_mtime_ns, stat.st_size
        mine = [made for made in read_overrides(folder) if made.trial == self.trial and made.number not in self.taken]
        self.cut = bool(mine) and mine[-1].verdict == "stop"
        return "pause" if self.cut else None
