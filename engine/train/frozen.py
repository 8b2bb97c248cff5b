"""The states that leave the frozen lower blocks of a model, computed once for every text and read from a mapped file afterwards.

When everything that learns sits at or above block k, nothing below it ever changes, so that its answer to a text is always the same. It is computed
before the first step, in batches that depend on the texts alone: a run that was interrupted computes the same bits again. From then on a pass over texts
that are known leaves the blocks below k out. Texts are known by their tokens, so that it does not matter how they are batched, padded or packed.

How exact: a state is that of the plain path up to the last bits of matrix products, which depend on how many rows and places a batch has. After 50 steps in
fp32 the loss agrees within 1e-4, which a test compares. The file has no name on the disk once it is mapped, so that nothing stays behind.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.io.models import base_of
from engine.tasks.base import Example
from engine.tasks.batching import measuring, padded

if TYPE_CHECKING:
    from engine.train.run import Run

FILE = "frozen.states"
MAX_SHARE_OF_DISK = 0.5  # of what is free
LEAST_VISITS = 1.5  # of every text, on average, before computing them ahead is worth it
AGREES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # largest difference, of the largest number
_UNDERSTOOD = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "return_dict",
}  # of the inputs of a body; all others must be absent
_FILL_PLACES = 4096  # of one batch of the first pass, padding included
_FILL_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Bottom:
    """What lies below everything that learns: the first `blocks` of `stack`."""

    body: nn.Module
    stack: nn.ModuleList
    blocks: int
    random: bool  # whether they draw random numbers while training, as dropout does
    shape: tuple[int, torch.dtype]  # of a state: hidden size, and what it is kept in


def stack_of(body: nn.Module) -> nn.ModuleList | None:
    """The pile of blocks of a model's body; None where it has several or spells it in a way that we do not know."""
    config: Any = getattr(body, "config", None)
    count = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0) if config is not None else 0
    if not count or getattr(config, "is_encoder_decoder", False):
        return None
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(block) for block in module}) == 1:
            return module
    return None


def bottom_of(model: nn.Module, example: Sequence[int], autocast: Callable[[], Any]) -> Bottom | None:
    """Watch one pass over one text: the blocks in front of the first that autograd follows, and whether they draw random numbers."""
    body = base_of(model)
    stack = stack_of(body)
    if stack is None:
        return None
    device = next(model.parameters()).device
    reached: list[tuple[bool, bool]] = []  # of every block: followed by autograd, drew random numbers
    kept: list[Tensor] = []
    before = _generators(device)

    def look(module: nn.Module, args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        drew = any(not torch.equal(a, b) for a, b in zip(before, _generators(device), strict=True))
        reached.append((bool(state.requires_grad), drew))
        kept.append(state.detach()[:0])

    handles = [block.register_forward_hook(look) for block in stack]
    ids = torch.tensor([list(example)], device=device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad(), autocast():
            body(**_inputs(body, ids, torch.ones_like(ids)))
    finally:
        for handle in handles:
            handle.remove()
    if len(reached) != len(stack):
        return None
    frozen = next((place for place, (followed, _) in enumerate(reached) if followed), len(stack))
    if not frozen:
        return None
    state = kept[frozen - 1]
    return Bottom(
        body=body,
        stack=stack,
        blocks=frozen,
        random=reached[frozen - 1][1],
        shape=(state.shape[-1], state.dtype),
    )


class FrozenStates:
    """States of known texts behind chosen frozen blocks, and the hooks that put them in the place of those blocks.

    heard: the blocks whose answers are read by what lies above, counted from 0; the last frozen block is always among them.
    in_training: whether passes in training mode are served too, not only those that measure.
    """

    def __init__(self, bottom: Bottom, heard: frozenset[int], *, in_training: bool) -> None:
        self.bottom, self.in_training = bottom, in_training
        self.heard = tuple(sorted({*(place for place in heard if place < bottom.blocks), bottom.blocks - 1}))
        self.places: dict[bytes, int] = {}  # tokens of a text -> its first place in the file
        self.states = torch.empty(0)
        self._known_lengths: set[int] = set()
        self._handles: list[Any] = []
        self._undo: contextlib.ExitStack = contextlib.ExitStack()

    @staticmethod
    def num_bytes(bottom: Bottom, num_heard: int, num_places: int) -> int:
        """What the file takes for texts of so many tokens together."""
        hidden, dtype = bottom.shape
        return num_places * num_heard * hidden * dtype.itemsize

    def fill(self, texts: Sequence[Sequence[int]], file: Path, autocast: Callable[[], Any]) -> None:
        """Run the frozen blocks once over every text, and remember what leaves them."""
        by_key = {_key(np.asarray(text)): list(text) for text in texts}
        ordered = sorted(by_key.items(), key=lambda item: (len(item[1]), item[0]))
        total = sum(len(text) for _, text in ordered)
        hidden, dtype = self.bottom.shape
        with file.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, max(1, self.num_bytes(self.bottom, len(self.heard), total)))
        shape = (total, len(self.heard), hidden)
        self.states = torch.from_file(str(file), shared=True, size=total * len(self.heard) * hidden, dtype=dtype).view(
            shape
        )
        file.unlink()
        device, at = next(self.bottom.body.parameters()).device, 0
        with measuring(self.bottom.body), autocast(), self._only_below() as found:
            for start, end in _areas([len(text) for _, text in ordered]):
                part = ordered[start:end]
                ids = padded([text for _, text in part], 0)
                lengths = torch.tensor([len(text) for _, text in part])
                mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
                self.bottom.body(**_inputs(self.bottom.body, ids.to(device), mask.to(device)))
                states = torch.stack([found[place] for place in self.heard]).cpu()  # [heard, B, T, d]
                for row, (key, text) in enumerate(part):
                    self.states[at : at + len(text)] = states[:, row, : len(text)].transpose(0, 1)
                    self.places[key] = at
                    at += len(text)
        self._known_lengths = {len(text) for _, text in ordered}

    def serve(self) -> None:
        """From now on passes over known texts leave the frozen blocks out."""
        body = self.bottom.body
        self._handles = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after, always_call=True),
        ]

    @torch.no_grad()
    def agrees(self, texts: Sequence[Sequence[int]], autocast: Callable[[], Any]) -> bool:
        """Whether the body answers to a few texts as it does without us: not so where a block above reads more than the state in front of it."""
        body = self.bottom.body
        device = next(body.parameters()).device
        ids = padded(list(texts), 0)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]).long()
        inputs = _inputs(body, ids.to(device), mask.to(device))
        with measuring(body), autocast():
            plain = body(**inputs).last_hidden_state.float().cpu()
            self.serve()
            served = body(**inputs).last_hidden_state.float().cpu()
            self.pause()
        apart = (plain - served)[mask.bool()].abs().max() / plain[mask.bool()].abs().max()
        return bool(apart <= AGREES[self.bottom.shape[1]])

    def pause(self) -> None:
        """Every block runs again."""
        self._undo.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def close(self) -> None:
        """Every block runs again, and the file is gone."""
        self.pause()
        self.places, self.states = {}, torch.empty(0)

    # ── one pass ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _before(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if body.training and not self.in_training:
            return None
        names = list(inspect.signature(type(body).forward).parameters)[1 : 1 + len(args)]
        kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
        states = self.lookup(kwargs)
        if states is None:
            return None
        for place, block in enumerate(list(self.bottom.stack)[: self.bottom.blocks]):
            self._undo.enter_context(_answering(block, states.get(place)))
        return (), {**kwargs, **_no_cache(body)}  # a block that does not run leaves no keys and values

    def _after(self, body: nn.Module, args: Any, output: Any) -> None:
        self._undo.close()

    def lookup(self, inputs: Mapping[str, Any]) -> dict[int, Tensor] | None:
        """The states [B, T, d] of a batch behind every heard block, zero at its padding; None when the batch is not understood or holds an unknown text."""
        others = {name for name, value in inputs.items() if value is not None and value is not False} - _UNDERSTOOD
        ids = inputs.get("input_ids")
        if others or not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if not all(value is None or isinstance(value, Tensor) for value in (mask, positions)):
            return None
        mask_tells = mask is not None and mask.dim() == 2
        if mask is not None and mask_tells:
            spans = _spans_of_mask(mask, positions)
        else:
            spans = _spans_of_positions(positions) if positions is not None else None
        if spans is None:
            return None
        tokens = ids.cpu().numpy()
        hidden, dtype = self.bottom.shape
        found = torch.zeros(len(self.heard), *ids.shape, hidden, dtype=dtype)  # [heard, B, T, d]
        for row, start, end in spans:
            at = self.places.get(_key(tokens[row, start:end])) if end - start in self._known_lengths else None
            if at is not None:
                found[:, row, start:end] = self.states[at : at + end - start].transpose(0, 1)
            elif end - start > 1 or mask_tells:  # packed rows are padded with places that stand by themselves
                return None
        moved = found.to(ids.device, non_blocking=True)
        return dict(zip(self.heard, moved, strict=True))

    @contextlib.contextmanager
    def _only_below(self) -> Iterator[dict[int, Tensor]]:
        """The blocks above answer with what they are asked; what the heard blocks answer is collected."""
        found: dict[int, Tensor] = {}

        def collect(place: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[place] = output[0] if isinstance(output, tuple) else output

            return hook

        blocks = list(self.bottom.stack)
        handles = [blocks[place].register_forward_hook(collect(place)) for place in self.heard]
        try:
            with contextlib.ExitStack() as above:
                for block in blocks[self.bottom.blocks :]:
                    above.enter_context(_answering(block, None))
                yield found
        finally:
            for handle in handles:
                handle.remove()


def remember(run: Run) -> FrozenStates | None:
    """Compute the states below everything that learns, when the recipe wants it, all parts allow it and it pays; say in the log what was done, or why not."""
    setting = run.settings.frozen_cache
    sliced = run.pause_at is not None  # a search trains in slices, each shorter than what would be computed ahead
    if setting == "off" or sliced:
        return None
    train, held = run.encoded.train, list(run.task.measured(run.encoded, run.tokenizer))
    against = [name for name, part in run.slots.names.items() if not part.spares_frozen_blocks]
    bottom = None if against else bottom_of(run.model, train[0].token_rows()[0], run.autocast)
    if bottom is None:
        if setting == "on":
            _give_up(run, _why_not(against))
        return None
    visits = run.clock.total_steps / max(1, run.clock.steps_per_epoch)
    in_training = (setting == "on" or not bottom.random) and (setting == "on" or visits >= LEAST_VISITS)
    if not in_training and run.settings.evaluations < 2:
        return None
    examples: list[Example] = [*train, *held] if in_training else held
    rows = [row for example in examples for row in example.token_rows()]
    texts = [piece for row in rows for piece in run.task.pieces(row, run.tokenizer)]
    heard = frozenset(place for part in run.slots.parametrizations for place in part.heard_blocks(run.model))
    states = FrozenStates(bottom, heard, in_training=in_training)
    size = states.num_bytes(bottom, len(states.heard), sum(map(len, texts)))
    free = int(shutil.disk_usage(run.folder).free * MAX_SHARE_OF_DISK)
    if size > free:
        _give_up(
            run, f"its states take up to {size / 1e9:.1f} GB, and half of the free disk space is {free / 1e9:.1f} GB"
        )
        return None
    try:
        states.fill(texts, run.folder / FILE, run.autocast)
    except OSError as error:
        (run.folder / FILE).unlink(missing_ok=True)
        _give_up(run, f"its file could not be written ({error.strerror})")
        return None
    if not states.agrees(texts[:2], run.autocast):
        states.close()
        _give_up(run, "the blocks above read more than the states in front of them")
        return None
    states.serve()
    left_out = (
        "from now on"
        if in_training
        else "whenever it is measured; while learning they draw random numbers and run as they are"
    )
    message = f"Nothing learns in the first {bottom.blocks} of {len(bottom.stack)} blocks: they ran once for {len(states.places):,} texts"
    message += f" and are left out {left_out} ({size / 1e6:,.1f} MB on the disk until the run ends)."
    run.log.emit("log", {"level": "info", "message": message}, step=run.clock.step)
    return states


def _why_not(against: Sequence[str]) -> str:
    if against:
        names = ", ".join(sorted({name.partition(".")[0] for name in against}))
        return f"{names} may read or change what happens there"
    return "something learns in the first block or below it, or this model's blocks are spelled in an unknown way"


def _give_up(run: Run, why: str) -> None:
    message = f"The frozen part is not remembered: {why}. Each step runs the whole model."
    run.log.emit("log", {"level": "warning", "message": message}, step=run.clock.step)


@contextlib.contextmanager
def _answering(block: nn.Module, state: Tensor | None) -> Iterator[None]:
    """Let a block answer with a given state, or with what it is asked, without running. Its hooks run as ever."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        return given if state is None else state

    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _spans_of_mask(mask: Tensor, positions: Tensor | None) -> list[tuple[int, int, int]] | None:
    """(row, start, end) of the text in every row; None unless each stands at the left and is counted from zero."""
    real = mask.cpu() != 0
    lengths, places = real.sum(1), torch.arange(real.shape[1])
    if not torch.equal(places < lengths[:, None], real):
        return None
    if positions is not None and not bool(((positions.cpu() == places) | ~real).all()):
        return None
    return [(row, 0, length) for row, length in enumerate(lengths.tolist()) if length]


def _spans_of_positions(positions: Tensor) -> list[tuple[int, int, int]] | None:
    """(row, start, end) of every piece of a row whose positions count up from zero; None where they do not."""
    rows = positions.cpu().numpy()
    spans = []
    for row, numbers in enumerate(rows):
        starts = np.flatnonzero(numbers == 0)
        if not len(starts) or starts[0] != 0:
            return None
        ends = np.append(starts[1:], len(numbers))
        if not np.array_equal(numbers, np.arange(len(numbers)) - np.repeat(starts, ends - starts)):
            return None
        spans += [(row, int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
    return spans


def _areas(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches of growing lengths whose batches have a bounded area."""
    start = 0
    for place, length in enumerate(lengths):
        if place > start and ((place - start + 1) * length > _FILL_PLACES or place - start == _FILL_ROWS):
            yield start, place
            start = place
    if start < len(lengths):
        yield start, len(lengths)


def _inputs(body: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": mask, **_no_cache(body)}


def _no_cache(body: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(type(body).forward).parameters else {}


def _key(tokens: np.ndarray[Any, Any]) -> bytes:
    return tokens.astype(np.int32).tobytes()


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
