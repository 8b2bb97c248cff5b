"""What the tasks of causal language models share: loading, collation, logits at supervised places, perplexity, and generation."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from engine.core.errors import bad_input
from engine.core.facts import DataFacts, Facts, ModelFacts
from engine.core.recipe import Recipe
from engine.io.facts import AUTO_CLASSES
from engine.io.models import load_config, load_model, load_tokenizer, model_folder
from engine.io.sources import model_fault
from engine.starters import general_texts
from engine.tasks.base import Encoded, Example, Predictor, States, Task
from engine.tasks.batching import (
    IGNORED,
    bucketed,
    is_packed,
    measuring,
    moved,
    owners,
    packed_batch,
    plain_batch,
    sliced,
    unpacked,
)
from engine.tasks.examples import lengths_of, take
from engine.tasks.segments import attends_within

GENERAL_TOKENS = 96
_EVAL_TOKENS = 8192  # of one evaluation batch, padding included


class LanguageTask(Task):
    """A decoder that learns to continue. Labels are aligned with input_ids; the place t predicts the label at t + 1."""

    model_kinds = ("decoder",)

    def end_mark(self, tokenizer: Any) -> int | None:
        """The token that ends a document, where one example may hold several documents; they do not see each other."""
        return None

    def load_model(self, facts: ModelFacts, data: DataFacts, *, dtype: torch.dtype, seed: int) -> nn.Module:
        folder = model_folder(facts)
        model, fresh = load_model(folder, AUTO_CLASSES[self.name], dtype=dtype, config=load_config(folder), seed=seed)
        if fresh:
            raise model_fault("The weights of this model are not complete.", f"{len(fresh)} tensors are missing, first {fresh[0]}.",
                              "Copy or fetch the model again, or choose another.", "missing_weights")  # fmt: skip
        return model

    def load_tokenizer(self, facts: ModelFacts) -> Any:
        return load_tokenizer(model_folder(facts))

    def batches(
        self, examples: Sequence[Example], order: Sequence[int], batch_size: int, recipe: Recipe
    ) -> list[list[int]]:
        packed = recipe.settings.packing
        return sliced(order, batch_size) if packed else bucketed(examples, order, batch_size)

    def collate(self, examples: Sequence[Example], tokenizer: Any, recipe: Recipe) -> dict[str, Tensor]:
        if self.packs_examples and recipe.settings.packing:
            return packed_batch(examples, tokenizer.pad_token_id, self.end_mark(tokenizer))
        return plain_batch(examples, tokenizer.pad_token_id)

    def forward_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> States | None:
        """What the head would read at the supervised places, so that logits need never exist all at once; None where the model does more than that."""
        head = direct_head(model)
        if head is None:
            return None
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            return (args[0][:, :0],)

        supervised, places, inputs = self._inputs(model, batch)
        handle = head.register_forward_pre_hook(catch)
        try:
            model(**inputs, logits_to_keep=places)
        finally:
            handle.remove()
        chosen = supervised[0][:, places]  # [B, P]
        return States(caught[0][chosen], supervised[1][:, places][chosen], head)

    def forward_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        states = self.forward_states(model, batch)
        if states is not None:
            return states.head(states.hidden), states.labels
        (supervised, targets), places, inputs = self._inputs(model, batch)
        if _takes(model, "logits_to_keep"):
            logits = model(**inputs, logits_to_keep=places).logits  # [B, P, vocab]
        else:
            logits = model(**inputs).logits[:, places]
        chosen = supervised[:, places]  # [B, P]
        return logits[chosen], targets[:, places][chosen]

    def _inputs(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, dict[str, Any]]:
        """((supervised, targets) [B, T-1], the places [P] where any row predicts something that counts, arguments for the model)."""
        if is_packed(batch) and not attends_within(model):
            batch = unpacked(batch, 0)
        targets = batch["labels"][:, 1:]
        supervised = targets != IGNORED
        inputs: dict[str, Any] = {
            name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
        }
        if _takes(model, "use_cache"):
            inputs["use_cache"] = False
        return (supervised, targets), supervised.any(0).nonzero().squeeze(1), inputs

    def evaluate(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> dict[str, Any]:
        scores = self.measure(model, encoded.holdout, tokenizer, device)
        general = self.measure(model, general_examples(tokenizer), tokenizer, device)
        return {**scores, "general_loss": general["eval_loss"], "general_loss_se": general["eval_loss_se"]}

    def pieces(self, row: Sequence[int], tokenizer: Any) -> list[Sequence[int]]:
        end = self.end_mark(tokenizer)
        cuts = [0, *(place + 1 for place, token in enumerate(row[:-1]) if token == end), len(row)]
        return [row[start:stop] for start, stop in itertools.pairwise(cuts)]

    def measured(self, encoded: Encoded, tokenizer: Any) -> Sequence[Example]:
        return [*encoded.holdout, *general_examples(tokenizer)]

    def measure(
        self, model: nn.Module, examples: Sequence[Example], tokenizer: Any, device: torch.device
    ) -> dict[str, Any]:
        """Token-weighted mean loss; its standard error is that of a ratio of sums over examples."""
        sums, counts = self._sums(model, examples, tokenizer, device)
        total, number = float(counts.sum()), len(examples)
        loss = float(sums.sum()) / total if total else math.nan
        spread = float(((sums - loss * counts) ** 2).sum()) * number / max(1, number - 1)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {
            "eval_loss": loss,
            "eval_loss_se": math.sqrt(spread) / total if total else math.nan,
            "eval_perplexity": perplexity,
        }

    def judged(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> list[dict[str, Any]]:
        sums, counts = self._sums(model, encoded.holdout, tokenizer, device)
        return [
            {"row": example.source, "loss": total / weight if weight else None, "weight": weight}
            for example, total, weight in zip(encoded.holdout, sums.tolist(), counts.tolist(), strict=True)
        ]

    def _sums(
        self, model: nn.Module, examples: Sequence[Example], tokenizer: Any, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses, number of supervised tokens) of each example, fp64 [N]."""
        lengths = lengths_of(examples)
        by_length = sorted(range(len(examples)), key=lengths.__getitem__)
        sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
        with measuring(model):
            for indices in _token_batches(lengths, by_length):
                batch = packed_batch(take(examples, indices), tokenizer.pad_token_id, self.end_mark(tokenizer))
                logits, labels = self.forward_logits(model, moved(batch, device))
                losses = functional.cross_entropy(logits.float(), labels, reduction="none").double().cpu()  # [N]
                place = torch.tensor(indices)[owners(batch, [lengths[index] for index in indices])]
                sums.index_add_(0, place, losses)
                counts.index_add_(0, place, torch.ones_like(losses))
        return sums, counts

    def baseline(
        self,
        untouched: Callable[[], nn.Module],
        first_scores: Mapping[str, Any],
        encoded: Encoded,
        tokenizer: Any,
        facts: Facts,
        device: torch.device,
    ) -> dict[str, Any]:
        sentence = (
            f"Before training, the model gave each token of the held-out texts a loss of {first_scores['eval_loss']:.3f} "
            f"(perplexity {first_scores['eval_perplexity']:.4g}); lower is better."
        )
        return {"name": "the same model before training", "sentence": sentence, **first_scores}

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts) -> Predictor:
        return Writer(model, tokenizer)

    def export_model(self, model: nn.Module, tokenizer: Any, data: DataFacts, folder: Any) -> None:
        model.save_pretrained(Path(folder))  # type: ignore[operator]
        tokenizer.save_pretrained(Path(folder))


def general_examples(tokenizer: Any) -> list[Example]:
    """The forgetting meter's fixed set: short plain-English paragraphs about everything, written for this studio, cut at 96 tokens."""
    encoded = [tokenizer(text, add_special_tokens=True)["input_ids"][:GENERAL_TOKENS] for text in general_texts()]
    return [Example(input_ids=ids, labels=list(ids), source=place) for place, ids in enumerate(encoded)]


class Writer(Predictor):
    """Continues texts and answers conversations, one at a time, greedily unless a temperature is given."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [own] if isinstance(own, int) else list(own or [])
        self.ends = sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})

    def prompt_ids(self, given: Any) -> list[int]:
        """The tokens that the model is asked to continue."""
        if not isinstance(given, str) or not given.strip():
            raise bad_input(
                "inputs",
                "There is no text to continue.",
                "Each input is a text.",
                "Write the beginning of a text.",
                "bad_prompt",
            )
        return list(self.tokenizer(given)["input_ids"])

    def shown(self, prompt: list[int], tokens: list[int]) -> str:
        """New tokens as text, with the space that a tokenizer drops at the start of a text."""
        before = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
        both = str(self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True))
        return (
            both[len(before) :]
            if both.startswith(before)
            else str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        )

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Options: max_new_tokens (64), temperature (0 = always the likeliest token), seed (17)."""
        most, temperature, seed = (
            int(options.get("max_new_tokens", 64)),
            float(options.get("temperature", 0.0)),
            int(options.get("seed", 17)),
        )
        if not (1 <= most <= 4096 and 0.0 <= temperature <= 10.0):
            raise bad_input("options", "The length or the temperature is out of range.", "The length goes from 1 to 4096 tokens, the temperature from 0 to 10.",
                            "Choose values within.", "out_of_range")  # fmt: skip
        answers = []
        for given in inputs:
            prompt = self.prompt_ids(given)
            tokens = self._continue(prompt, most, temperature, seed)
            ended = bool(tokens) and tokens[-1] in self.ends
            answers.append({"text": self.shown(prompt, tokens), "num_tokens": len(tokens), "ended": ended})
        return answers

    def show(self, inputs: Sequence[Any], most: int) -> list[str]:
        """The likeliest answers, all at once, of at most so many tokens each. For showing only: beside longer prompts a tie between two tokens may
        fall otherwise than alone."""
        prompts = [self.prompt_ids(given) for given in inputs]
        if not prompts:
            return []
        limit = int(getattr(self.model.config, "max_position_embeddings", 0) or 0)  # type: ignore[union-attr, arg-type]
        if limit:
            most = min(most, max(1, limit - 8))
            prompts = [prompt[-(limit - most) :] for prompt in prompts]
        pad = self.tokenizer.pad_token_id
        with measuring(self.model):
            found = likeliest(self.model, prompts, most, self.ends, pad if pad is not None else 0)
        return [self.shown(prompt, tokens) for prompt, tokens in zip(prompts, found, strict=True)]

    def _continue(self, prompt: list[int], most: int, temperature: float, seed: int) -> list[int]:
        device = next(self.model.parameters()).device
        limit = int(getattr(self.model.config, "max_position_embeddings", 0) or 0)  # type: ignore[union-attr, arg-type]
        if limit:
            most = min(most, max(1, limit - 8))
            prompt = prompt[-(limit - most) :]
        settings = transformers.GenerationConfig(
            max_new_tokens=most, do_sample=temperature > 0, temperature=temperature or None, eos_token_id=self.ends or None,
            pad_token_id=self.tokenizer.pad_token_id, use_cache=True,
        )  # fmt: skip
        ids = torch.tensor([prompt], device=device)
        with measuring(self.model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
        return list(out[0, len(prompt) :].tolist())


def likeliest(model: nn.Module, prompts: list[list[int]], most: int, ends: list[int], pad: int) -> list[list[int]]:
    """The likeliest continuation of each prompt, all at once; prompts are filled up on the left."""
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)  # type: ignore[union-attr, arg-type]
    longest = max(len(prompt) for prompt in prompts)
    most = min(most, limit - longest) if limit else most
    if most < 1:
        return [[] for _ in prompts]
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)  # [B, T]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    settings = transformers.GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=ends or None, pad_token_id=pad, use_cache=True
    )
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    answers = []
    for row in out[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward pass has an argument of this name."""
    return name in inspect.signature(type(model).forward).parameters


_DIRECT = re.compile(
    r"hidden_states = slice_logits_to_keep\(hidden_states, logits_to_keep\)\s+logits = self\.(\w+)\(hidden_states\)\s+loss = None"
)


def direct_head(model: nn.Module) -> nn.Linear | None:
    """The output layer of a model whose logits are that layer's answer and nothing else: not scaled, not capped, not watched by anyone."""
    found = _DIRECT.search(_forward_source(type(model).forward))
    head = getattr(model, found[1]) if found else None
    plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
    return head if plain and "forward" not in vars(model) and not model._forward_hooks else None


def heads_directly(architecture: str) -> bool:
    """The same of a class of transformers, by its name: whether the logits of its models need never exist all at once."""
    kind = getattr(transformers, architecture, None)
    return isinstance(kind, type) and _DIRECT.search(_forward_source(kind)) is not None


@functools.cache
def _forward_source(forward: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):  # a class that was made at run time
        return ""


def _token_batches(lengths: Sequence[int], order: Sequence[int]) -> list[list[int]]:
    """Batches of bounded area from an order of growing lengths."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= _EVAL_TOKENS and len(batches[-1]) < 64:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
