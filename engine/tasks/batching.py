"""Holding out, bucketing, padding and packing: pure functions that every task shares."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from engine.tasks.base import Example
from engine.tasks.examples import Ints, lengths_of, rows_of
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
    lengths = lengths_of(examples)
    for start in range(0, len(order), batch_size * WINDOW):
        window = list(enumerate(order[start : start + batch_size * WINDOW]))
        window.sort(key=lambda item: lengths[item[1]])
        cut = [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
        batches += [[index for _, index in batch] for batch in sorted(cut)]
    return batches


def padded(rows: Sequence[Sequence[int] | Ints], filler: int) -> Tensor:
    """Rows of numbers as one tensor [rows, longest], filled up on the right."""
    full = np.full((len(rows), max(map(len, rows), default=0)), filler, np.int64)
    for line, row in zip(full, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(full)


def padded_batch(rows: Sequence[Sequence[int] | Ints], pad: int, num_samples: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T] of token rows, with the number of real tokens and of examples."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = padded(rows, pad)
    return {
        "input_ids": ids,
        "attention_mask": torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)),
        "num_tokens": torch.tensor(int(lengths.sum())),
        "num_samples": torch.tensor(num_samples),
    }


def plain_batch(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """One example a row: input_ids, attention_mask and labels [B, T]."""
    batch = padded_batch(rows_of(examples, "input_ids"), pad, len(examples))
    return {**batch, "labels": padded(rows_of(examples, "labels"), IGNORED)}


def packed_batch(examples: Sequence[Example], pad: int, end: int | None = None) -> dict[str, Tensor]:
    """All examples in one row [1, N] without any padding, kept apart: the lengths stand in the place of a mask (engine.tasks.segments), positions start
    anew in each example, and no first token is predicted from the example before it. With `end`, the mark that ends a document, the documents inside of
    an example are kept apart in the same way."""
    sizes = np.array(lengths_of(examples))
    starts, total = np.cumsum(sizes) - sizes, int(sizes.sum())
    row = _one_row(rows_of(examples, "input_ids"), total)
    if end is not None:
        starts = np.union1d(starts, np.flatnonzero(row[:-1] == end) + 1)
    if len(starts) == len(examples) and len(set(sizes.tolist())) == 1:
        return plain_batch(examples, pad)  # there is no padding to save, and nothing to keep apart
    lengths = np.diff(np.append(starts, total))
    labels = _one_row(rows_of(examples, "labels"), total)
    labels[starts] = IGNORED
    return {
        "input_ids": torch.from_numpy(row)[None],
        "attention_mask": torch.from_numpy(lengths).view(1, 1, 1, -1),
        "position_ids": torch.from_numpy(np.arange(total) - np.repeat(starts, lengths))[None],
        "labels": torch.from_numpy(labels)[None],
        "num_tokens": torch.tensor(total),
        "num_samples": torch.tensor(len(examples)),
    }


def _one_row(rows: Sequence[Sequence[int] | Ints], total: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """All numbers one behind another, [total]."""
    row = np.empty(total, np.int64)
    np.concatenate(rows, out=row)
    return row


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether several examples share a row, as `packed_batch` lays them."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.dim() == 4 and mask.dtype == torch.int64


def owners(batch: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
    """Which example each supervised place of a batch belongs to, [n], in the order of the logits; `lengths` are those of its examples."""
    supervised = batch["labels"][:, 1:] != IGNORED
    if not is_packed(batch):
        return supervised.nonzero()[:, 0]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[1:][supervised[0]]


def unpacked(batch: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
    """The plain batch of a packed one, for models and methods that need one example a row."""
    lengths = batch["attention_mask"].flatten().tolist()
    pieces = zip(*(batch[name][0].split(lengths) for name in ("input_ids", "labels")), strict=True)
    plain = plain_batch([Example(ids.tolist(), labels.tolist(), 0) for ids, labels in pieces], pad)
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
