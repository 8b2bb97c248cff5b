"""Checkpoints that are written while the training goes on.

The loop waits for a copy of the state, not for the disk: hashing, writing and syncing are done by one thread. At most one checkpoint is on its way;
whoever needs it on the disk calls `wait`, and the next one waits by itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.events import EventLog
from engine.io.machine import free_memory
from engine.train import checkpoint
from engine.train.checkpoint import Draft, Snapshot

_NICE = 5  # the writer steps back where it would compete with the training for a core


class CheckpointWriter:
    """Writes checkpoints of one run from copies in memory of its own, which each save uses again.

    Where memory is too short for a copy, the checkpoint is written from the tensors of the run, and the run waits.
    """

    def __init__(self, folder: Path, log: EventLog, keep: int = 2) -> None:
        self.folder, self.log, self.keep = folder, log, keep  # so many of the newest stay, and the best one
        self._copies: dict[tuple[str, str], Tensor] = {}  # (file, tensor) -> a buffer of its shape and type
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._news: tuple[int, dict[str, Any]] | None = None  # step and data of the event that tells of the checkpoint

    def put(self, snapshot: Snapshot, best_step: int | None) -> None:
        """Take over a checkpoint. The log up to here is flushed; the thread syncs it before the checkpoint gets its name."""
        self.wait()
        draft = snapshot.draft()
        copied = self._copied(draft)
        if copied is None:
            self._write(draft, best_step)
            self.wait()
            return
        copies, arrived = copied
        self._thread = threading.Thread(target=self._write, args=(copies, best_step, arrived), name="checkpoint")
        self._thread.start()

    def collect(self) -> bool:
        """Tell of a checkpoint that is finished by now, or raise what went wrong with it; never waits. Says whether there was one."""
        if self._thread is None or self._thread.is_alive():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises what kept it from there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        news, self._news = self._news, None
        if error is not None:
            raise error
        if news is not None:
            self.log.emit("checkpoint", news[1], step=news[0])

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Whatever happens inside, afterwards nothing is on its way any more; what went wrong first is what is told."""
        try:
            yield
        except BaseException as first:
            try:
                self.wait()
            except Exception as second:
                first.add_note(f"The checkpoint that was being written failed too: {second}")
            raise
        self.wait()

    def _write(self, draft: Draft, best_step: int | None, arrived: torch.cuda.Event | None = None) -> None:
        try:
            if self._thread is not None:
                _step_back()
            if arrived is not None:
                arrived.synchronize()
            self.log.settle()
            path = checkpoint.save(self.folder, draft)
            checkpoint.prune(self.folder, best_step, self.keep)
            self._news = (
                draft.step,
                {"path": f"{checkpoint.FOLDER}/{path.name}", "best": best_step == draft.step},
            )
        except BaseException as error:  # raised again in the thread of the run
            self._error = error

    @torch.no_grad()
    def _copied(self, draft: Draft) -> tuple[Draft, torch.cuda.Event | None] | None:
        """The draft in memory of our own, and when it has arrived from a GPU; None when there is no room for it.

        Copies from a GPU stand in its queue between this step and the next: they see this step's values, and no one waits for them but the writer.
        """
        wanted = {(file, name): tensor for file, tensors in draft.files.items() for name, tensor in tensors.items()}
        kept = {
            place: self._copies[place] for place, tensor in wanted.items() if _fits(self._copies.get(place), tensor)
        }
        self._copies = kept
        missing = sum(tensor.nbytes for place, tensor in wanted.items() if place not in kept)
        if missing and missing > free_memory() // 2:
            self._copies = {}
            return None
        for place, tensor in wanted.items():
            if place not in kept:
                kept[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            kept[place].copy_(tensor, non_blocking=True)
        arrived = None
        if any(tensor.is_cuda for tensor in wanted.values()):
            arrived = torch.cuda.Event()
            arrived.record()
        files = {file: {name: kept[file, name] for name in tensors} for file, tensors in draft.files.items()}
        return Draft(step=draft.step, files=files, text=draft.text), arrived


def _fits(buffer: Tensor | None, tensor: Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


def _step_back() -> None:
    """Give this thread a lower priority; only Linux has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
