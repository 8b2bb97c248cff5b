"""The task protocol: everything the loop, the export and the predictor need to know about what a model is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.core.facts import DataFacts, Facts, ModelFacts
from engine.core.recipe import Recipe
from engine.io.datasets import read_rows

Row = Mapping[str, Any]  # role -> value, e.g. {"text": …, "label": …} or {"messages": […]}


@dataclass(slots=True)
class Example:
    """One encoded example: token ids, labels (-100 = not supervised; or one class id), and its length in tokens."""

    measured: ClassVar[tuple[str, ...]] = ("input_ids",)  # whose longest is the length
    input_ids: list[int]
    labels: list[int]
    source: int  # row number in the data

    def __len__(self) -> int:
        return len(self.input_ids)

    def token_rows(self) -> tuple[list[int], ...]:
        """Every row of tokens that the model reads for it."""
        return (self.input_ids,)


@dataclass(kw_only=True)
class Encoded:
    """Encoded train and held-out examples, with what was noticed on the way (truncated, dropped, …) as sentences."""

    train: Sequence[Example]
    holdout: Sequence[Example]
    holdout_rows: Sequence[Row]
    rows: Sequence[Row] = ()  # every row of the data; `Example.source` counts in them
    notes: list[str] = field(default_factory=list)
    num_train_tokens: int = 0


@dataclass(frozen=True, slots=True)
class States:
    """What the output layer reads at the supervised places, hidden [n, d], what it should answer there, labels [n], and the layer."""

    hidden: Tensor
    labels: Tensor
    head: nn.Linear


class Task:
    """One task; a singleton found by `engine.tasks.task(name)`. All methods are deterministic given their arguments."""

    name: str
    title: str  # "Sort texts into topics"
    sentence: str  # for a person: what you get
    data_shapes: tuple[str, ...]  # shapes it can learn from
    roles: tuple[str, ...]  # columns it needs
    model_kinds: tuple[str, ...]
    example_type: type[Example] = Example  # what `encode` makes
    encoding_settings: tuple[str, ...] = (
        "max_length",
        "packing",
        "holdout",
        "seed",
    )  # all that `encode` reads of the recipe
    rows_per_example = 1  # that the model reads
    packs_examples = False  # whether several examples may share a row
    fills_rows = False  # whether packing cuts one long stream, so that every row is as long as the longest may be

    def rows(self, data: DataFacts) -> Iterator[Row]:
        """Stream the usable rows of the data as role -> value."""
        yield from read_rows(data)

    def load_model(self, facts: ModelFacts, data: DataFacts, *, dtype: torch.dtype, seed: int) -> nn.Module:
        """The transformers model, weights loaded from safetensors, fresh heads initialised from `seed`. On the CPU, in eval mode."""
        raise NotImplementedError

    def load_tokenizer(self, facts: ModelFacts) -> Any:
        """The tokenizer of the model folder (never with remote code); a pad token is guaranteed."""
        raise NotImplementedError

    def goodness(self, scores: Mapping[str, Any]) -> tuple[float, ...]:
        """What decides which checkpoint is the best: compared as a tuple, larger is better. Default: the held-out loss."""
        return (-float(scores["eval_loss"]),)

    def fresh(self, model: nn.Module) -> tuple[str, ...]:
        """Names of modules that carry no pretrained weights (a new classifier). They always learn, with every parametrization."""
        return ()

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        """Split off the held-out rows (seeded, stratified where classes exist) and turn rows into examples."""
        raise NotImplementedError

    def batches(
        self, examples: Sequence[Example], order: Sequence[int], batch_size: int, recipe: Recipe
    ) -> list[list[int]]:
        """Group the ordered indices of an epoch into micro-batches (length buckets, packing); a pure function of its arguments."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example], tokenizer: Any, recipe: Recipe) -> dict[str, Tensor]:
        """Tensors of one micro-batch. Always has "input_ids" and "labels"; "num_tokens" (0-d) counts real tokens, "num_samples" examples."""
        raise NotImplementedError

    def forward_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(logits [n, classes or vocab], labels [n]) at the supervised places only."""
        raise NotImplementedError

    def forward_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> States | None:
        """What comes before `forward_logits`, for objectives that need no logits; None where there is no such thing."""
        return None

    def evaluate(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> dict[str, Any]:
        """eval_loss, eval_loss_se, and the task's own metrics (eval_accuracy, eval_macro_f1, eval_perplexity …), in eval mode, no grad."""
        raise NotImplementedError

    def judged(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> list[dict[str, Any]]:
        """What `evaluate` sums up, for each held-out example: {"row": its number in the data, "loss", "weight"}, and where the task has them
        "right", "prompt", "output", "expected"."""
        raise NotImplementedError

    def pieces(self, row: Sequence[int], tokenizer: Any) -> list[Sequence[int]]:
        """A row of tokens, cut where the model does not look back beyond."""
        return [row]

    def measured(self, encoded: Encoded, tokenizer: Any) -> Sequence[Example]:
        """The examples that `evaluate` lets the model read, each as it stands."""
        return encoded.holdout

    def baseline(
        self,
        untouched: Callable[[], nn.Module],
        first_scores: Mapping[str, Any],
        encoded: Encoded,
        tokenizer: Any,
        facts: Facts,
        device: torch.device,
    ) -> dict[str, Any]:
        """The honest rival: {"name", "sentence", metrics…}. `untouched` loads the base model once more, for rivals that need it;
        `first_scores` are those of the run before its first step."""
        raise NotImplementedError

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        """A few held-out prompts with the model's output and what was expected."""
        raise NotImplementedError

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts) -> Predictor:
        raise NotImplementedError

    def export_model(self, model: nn.Module, tokenizer: Any, data: DataFacts, folder: Any) -> None:
        """save_pretrained of a plain model (safetensors) with tokenizer, chat template and label names in the config."""
        raise NotImplementedError


class Predictor:
    """How an artifact answers. `predict` takes texts or conversations and gives JSON answers."""

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """classify: [{"label", "score", "scores": [{"label","score"}…]}]; language models: [{"text", "num_tokens"}]."""
        raise NotImplementedError

    # A predictor that learns while it serves has a state; the others keep none.

    def state_dict(self) -> dict[str, Any]:
        """What it has learned while serving: {"name": Tensor | JSON value}."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""

    def reset(self) -> None:
        """Forget what was learned while serving."""

    def status(self) -> dict[str, Any]:
        """Numbers about what was learned while serving."""
        return {}
