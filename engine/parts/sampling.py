"""Sampling from a causal language model with a generator of one's own, and the log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.tasks.batching import IGNORED, measuring, padded


@dataclass(slots=True)
class Sampled:
    """One completion: its tokens (the end mark included), the log-probability of each at temperature 1, and whether it ended by itself."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Iterable[int],
    pad: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    top_k: int = 0,
) -> list[Sampled]:
    """Continue every prompt once, all in one batch with a key-value cache. Temperature 0 takes the likeliest token.

    Draws come from `generator` (a CPU generator) alone, one per row and step, so that the same generator gives the same tokens on every
    device up to rounding. The recorded log-probabilities are those of the untempered, untruncated distribution, as ratios need them.
    """
    device = next(model.parameters()).device
    stops = set(ends)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor(
        [[pad] * (longest - len(p)) + list(p) for p in prompts], device=device
    )  # [B, T], padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    found = [Sampled([], [], False) for _ in prompts]
    cache: Any = None
    with measuring(model):
        for _ in range(max_new_tokens):
            places = (mask.cumsum(1) - 1).clamp_min(0)  # [B, T], the padding is not counted
            now = ids if cache is None else ids[:, -1:]
            out = model(
                input_ids=now,
                attention_mask=mask,
                position_ids=places[:, -now.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float()  # [B, vocab]
            chosen = _draw(logits, temperature, top_k, generator)  # [B]
            scores = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
            for one, token, score in zip(found, chosen.tolist(), scores, strict=True):
                if not one.ended:
                    one.ids.append(token)
                    one.logprobs.append(score)
                    one.ended = token in stops
            if all(one.ended for one in found):
                break
            ids = torch.cat([ids, chosen[:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return found


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    scaled = logits / temperature
    if top_k:
        least = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    at = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)  # one draw a row
    below = scaled.double().softmax(-1).cumsum(-1)
    return (below < at * below[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


def token_logprobs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """log p(token t | tokens before t) [B, T-1] in fp32 with gradient; 0 where `labels` are not supervised.

    `batch` holds input_ids, attention_mask and labels [B, T] (labels equal input_ids at supervised places, -100 elsewhere). Logits are
    computed only at places where some row predicts something that counts.
    """
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED  # [B, T-1]
    places = counted.any(0).nonzero().squeeze(1)  # [P]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits = model(**inputs, use_cache=False, logits_to_keep=places).logits.float()  # [B, P, vocab]
    wanted = targets[:, places].clamp_min(0)
    picked = logits.gather(-1, wanted[..., None])[..., 0] - logits.logsumexp(-1)  # [B, P]
    whole = torch.zeros(targets.shape, dtype=picked.dtype, device=picked.device)
    return whole.index_copy(1, places, picked) * counted


def sequence_logprobs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(sum of log-probabilities [B], number of supervised tokens [B]) of every row."""
    each = token_logprobs(model, batch)
    return each.sum(1), (batch["labels"][:, 1:] != IGNORED).sum(1)


def completion_batch(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """A plain batch of (prompt, completion) rows in which the completions are supervised."""
    rows = [[*prompt, *completion] for prompt, completion in pairs]
    labels = [[IGNORED] * len(prompt) + list(completion) for prompt, completion in pairs]
    ids = padded(rows, pad)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": padded(labels, IGNORED),
        "num_tokens": lengths.sum(),
        "num_samples": torch.tensor(len(rows)),
    }
