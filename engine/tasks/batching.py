"""Holding out, bucketing, padding and packing: pure functions that every task shares."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.tasks.base import Example
from engine.train.parts import seeded

IGNORED = -100
WINDOW = 16  # batches that are sorted by length together


def split_rows(
    keys: Sequence[Hashable], strata: Sequence[Hashable], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """(train, held-out) row numbers in ascending order.

    Rows with one key (a repeated text) always fall on the same side, so that nothing is measured on a text that was learned. Each stratum gives
    its part of round(share * rows), and keeps at least one row for training.
    """
    members: dict[Hashable, dict[Hashable, list[int]]] = {}
    home: dict[Hashable, Hashable] = {}
    for number, (key, stratum) in enumerate(zip(keys, strata, strict=True)):
        members.setdefault(home.setdefault(key, stratum), {}).setdefault(key, []).append(number)
    sizes = {stratum: sum(map(len, groups.values())) for stratum, groups in members.items()}
    quotas = _quotas(sizes, share)
    held: set[int] = set()
    for place, (stratum, groups) in enumerate(members.items()):
        lists = list(groups.values())
        taken = 0
        for index in torch.randperm(len(lists), generator=seeded(seed, "holdout", str(place))).tolist():
            if taken + len(lists[index]) <= quotas[stratum]:
                held.update(lists[index])
                taken += len(lists[index])
    return [n for n in range(len(keys)) if n not in held], sorted(held)


def _quotas(sizes: Mapping[Hashable, int], share: float) -> dict[Hashable, int]:
    """Whole numbers that add up to round(share * rows), by largest remainder."""
    total = max(1, round(share * sum(sizes.values())))
    quotas = {stratum: min(int(size * share), size - 1) for stratum, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda stratum: quotas[stratum] - sizes[stratum] * share)
    for stratum in by_remainder:
        if sum(quotas.values()) < total and quotas[stratum] < sizes[stratum] - 1:
            quotas[stratum] += 1
    return quotas


def sliced(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches in the given order."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def bucketed(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of similar lengths: windows of the order are sorted by length, and their batches come in the order of their first members.

    A pure function of its arguments: the order carries all the randomness.
    """
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * WINDOW):
        window = list(enumerate(order[start : start + batch_size * WINDOW]))
        window.sort(key=lambda item: len(examples[item[1]]))
        cut = [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
        batches += [[index for _, index in batch] for batch in sorted(cut)]
    return batches


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of numbers as one tensor [rows, longest], filled up on the right."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long)


def plain_batch(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """One example a row: input_ids, attention_mask and labels [B, T]."""
    ids = padded([example.input_ids for example in examples], pad)  # [B, T]
    lengths = torch.tensor([len(example) for example in examples])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": padded([example.labels for example in examples], IGNORED),
        "num_tokens": lengths.sum(),
        "num_samples": torch.tensor(len(examples)),
    }


def packed_batch(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Several examples a row, kept apart: a mask that is causal within each example, and positions that start anew.

    A row is as long as the longest example, so packing only removes padding. When nothing fits together this is the plain batch.
    """
    room = max(len(example) for example in examples)
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        place = next((at for at, left in enumerate(free) if left >= len(example)), None)
        if place is None:
            rows.append([])
            free.append(room)
            place = len(rows) - 1
        rows[place].append(example)
        free[place] -= len(example)
    if len(rows) == len(examples):
        return plain_batch(examples, pad)
    segments = padded([[number for number, item in enumerate(row, 1) for _ in range(len(item))] for row in rows], 0)
    length = segments.shape[1]
    same = (
        segments[:, :, None] == segments[:, None, :]
    )  # [B, T, T]; padding is segment 0 and sees padding, so that no row of the mask is empty
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    labels = [[label for item in row for label in (IGNORED, *item.labels[1:])] for row in rows]
    return {
        "input_ids": padded([[token for item in row for token in item.input_ids] for row in rows], pad),
        "attention_mask": (same & causal)[:, None],  # [B, 1, T, T]
        "position_ids": padded([[position for item in row for position in range(len(item))] for row in rows], 0),
        "labels": padded(labels, IGNORED),
        "num_tokens": (segments > 0).sum(),
        "num_samples": torch.tensor(len(examples)),
    }


def unpacked(batch: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
    """The plain batch that a packed one was made of, for models that cannot keep packed examples apart."""
    examples: list[Example] = []
    for ids, labels, positions in zip(
        batch["input_ids"].tolist(), batch["labels"].tolist(), batch["position_ids"].tolist(), strict=True
    ):
        starts = [at for at, position in enumerate(positions) if position == 0]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if any(label != IGNORED for label in labels[begin:end]):  # padding is many pieces that teach nothing
                examples.append(Example(ids[begin:end], labels[begin:end], 0))
    plain = plain_batch(examples, pad)
    return {name: value.to(batch["input_ids"].device) for name, value in plain.items()}


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on another device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
