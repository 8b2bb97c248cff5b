"""Sort texts: a model learns to put a text into one of several classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.errors import bad_input
from engine.core.facts import DataFacts, Facts, ModelFacts
from engine.core.recipe import Recipe
from engine.io.facts import AUTO_CLASSES
from engine.io.models import base_of, load_config, load_model, load_tokenizer, model_folder, pad_token_id
from engine.tasks.base import Encoded, Example, Predictor, Row, Task
from engine.tasks.batching import bucketed, measuring, moved, padded_batch, split_rows
from engine.tasks.examples import Examples, Ragged, encoded_of, lengths_of, rows_of, take
from engine.tasks.tokens import Tokens

_EVAL_BATCH = {"cpu": 16, "cuda": 64}  # on a processor small batches waste less on padding and stay in its caches
_MAX_EMBEDDED = 2000  # training texts that the baseline learns from
_LONGEST = 512  # tokens that the predictor reads, where the model could read more


class Classify(Task):
    """One label a text. The classifier on top of the model is new, unless the model already has one for the very same labels."""

    name = "classify"
    title = "Sort texts into topics"
    sentence = "A model that reads a text and says which of your labels fits best, and how sure it is."
    data_shapes = ("classification",)
    roles = ("text", "label")
    model_kinds = ("encoder", "decoder")

    def load_model(self, facts: ModelFacts, data: DataFacts, *, dtype: torch.dtype, seed: int) -> nn.Module:
        folder = model_folder(facts)
        names = dict(enumerate(data.labels))
        known = dict(load_config(folder).id2label or {})
        config = load_config(
            folder, num_labels=len(names), id2label=names, label2id={label: place for place, label in names.items()}
        )
        config.problem_type = "single_label_classification"
        # Decoders find the last token of a text by the pad token, so model and tokenizer must mean the same one.
        config.get_text_config().pad_token_id = pad_token_id(folder)
        same = {int(place): label for place, label in known.items()} == names
        model, fresh = load_model(
            folder, AUTO_CLASSES[self.name], dtype=dtype, config=config, seed=seed, renew_heads=not same
        )
        object.__setattr__(model, "fresh_modules", tuple(dict.fromkeys(name.rpartition(".")[0] for name in fresh)))
        return model

    def load_tokenizer(self, facts: ModelFacts) -> Any:
        tokenizer = load_tokenizer(model_folder(facts))
        tokenizer.padding_side = "right"
        return tokenizer

    def goodness(self, scores: Mapping[str, Any]) -> tuple[float, ...]:
        """The share of right answers; between equals, the smaller loss."""
        return (float(scores["eval_accuracy"]), -float(scores["eval_loss"]))

    def fresh(self, model: nn.Module) -> tuple[str, ...]:
        """The heads always learn, because they belong to these labels; so does whatever the model's folder had no weights for."""
        body = base_of(model)
        heads = [
            name
            for name, child in model.named_children()
            if child is not body and any(True for _ in child.parameters())
        ]
        return tuple(dict.fromkeys([*heads, *getattr(model, "fresh_modules", ())]))

    def encode(self, rows: Sequence[Row], tokenizer: Any, recipe: Recipe, data: DataFacts) -> Encoded:
        settings = recipe.settings
        length = settings.max_length or 128
        place = {label: number for number, label in enumerate(data.labels)}
        kept = [number for number, row in enumerate(rows) if row["label"] in place]
        ids, num_cut = tokenized([rows[number]["text"] for number in kept], tokenizer, length)
        labels = np.array([place[rows[number]["label"]] for number in kept], np.int32)
        columns = {"input_ids": ids, "labels": Ragged(labels, np.arange(len(kept) + 1))}
        examples = Examples(columns, np.array(kept, np.int64))
        train, held = split_rows(
            [rows[number]["text"] for number in kept],
            [rows[number]["label"] for number in kept],
            settings.holdout,
            settings.seed,
        )
        if not train or not held:
            raise bad_input("data", "There are too few different texts.",
                            "Some must be kept back to measure on, the same text never stands on both sides, and one side would be empty.",
                            "Add other texts.", "no_holdout")  # fmt: skip
        notes = []
        if num_cut:
            notes.append(f"{num_cut:,} of {len(kept):,} texts are longer than {length} tokens and were cut at the end.")
        unmeasured = sorted(set(data.labels) - {rows[kept[index]]["label"] for index in held})
        if unmeasured:
            names = ", ".join(f"'{label}'" for label in unmeasured[:5])
            notes.append(f"No text with the label {names} was kept back, so how well it is learned cannot be measured.")
        return encoded_of(examples, train, held, rows, notes)

    def batches(
        self, examples: Sequence[Example], order: Sequence[int], batch_size: int, recipe: Recipe
    ) -> list[list[int]]:
        return bucketed(examples, order, batch_size)

    def collate(self, examples: Sequence[Example], tokenizer: Any, recipe: Recipe) -> dict[str, Tensor]:
        return _batch(examples, tokenizer.pad_token_id)

    def forward_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # [B, classes]
        return logits, batch["labels"]

    def evaluate(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> dict[str, Any]:
        logits = self._logits(model, encoded.holdout, tokenizer.pad_token_id, device)
        return _scores(functional.log_softmax(logits, dim=-1), _classes(encoded.holdout))

    def judged(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, recipe: Recipe, device: torch.device
    ) -> list[dict[str, Any]]:
        logits = self._logits(model, encoded.holdout, tokenizer.pad_token_id, device)
        truth, labels = _classes(encoded.holdout), Sorter(model, tokenizer).labels
        losses = functional.nll_loss(functional.log_softmax(logits, dim=-1), truth, reduction="none").tolist()
        found = zip(
            encoded.holdout, encoded.holdout_rows, losses, logits.argmax(-1).tolist(), truth.tolist(), strict=True
        )
        return [
            {"row": example.source, "loss": loss, "weight": 1.0, "right": said == meant,
             "prompt": str(row["text"]), "output": labels[said], "expected": labels[meant]}
            for example, row, loss, said, meant in found
        ]  # fmt: skip

    def baseline(
        self,
        untouched: Callable[[], nn.Module],
        first_scores: Mapping[str, Any],
        encoded: Encoded,
        tokenizer: Any,
        facts: Facts,
        device: torch.device,
    ) -> dict[str, Any]:
        """The better of two rivals that need no training of the model: the most frequent label, and a plain classifier on the untouched model."""
        classes = len(facts.data.labels)
        truth = _classes(encoded.holdout)
        frequent = _most_frequent(encoded.train, truth, facts.data.labels)
        plain = self._on_frozen_model(untouched(), encoded, tokenizer.pad_token_id, device, truth, classes)
        best, other = (plain, frequent) if plain["eval_accuracy"] >= frequent["eval_accuracy"] else (frequent, plain)
        return {**best, "also": [other]}

    def samples(self, model: nn.Module, encoded: Encoded, tokenizer: Any, count: int) -> list[dict[str, str]]:
        rows = encoded.holdout_rows[:count]
        answers = Sorter(model, tokenizer).predict([row["text"] for row in rows])
        return [
            {"prompt": row["text"], "output": answer["label"], "expected": row["label"]}
            for row, answer in zip(rows, answers, strict=True)
        ]

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts) -> Predictor:
        return Sorter(model, tokenizer)

    def export_model(self, model: nn.Module, tokenizer: Any, data: DataFacts, folder: Any) -> None:
        model.save_pretrained(Path(folder))  # type: ignore[operator]
        tokenizer.save_pretrained(Path(folder))

    def _logits(self, model: nn.Module, examples: Sequence[Example], pad: int, device: torch.device) -> Tensor:
        """Logits of all examples in their order, [N, classes], on the CPU in fp32."""
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        with measuring(model):
            for indices in _by_length(examples, device):
                logits, _ = self.forward_logits(model, moved(_batch(take(examples, indices), pad), device))
                for index, row in zip(indices, logits.float().cpu(), strict=True):
                    found[index] = row
        return torch.stack(found)

    def _on_frozen_model(
        self, model: nn.Module, encoded: Encoded, pad: int, device: torch.device, truth: Tensor, classes: int
    ) -> dict[str, Any]:
        from sklearn.linear_model import LogisticRegression

        step = max(1, -(-len(encoded.train) // _MAX_EMBEDDED))
        learned = encoded.train[::step]
        labels = _classes(learned).tolist()
        known = sorted(set(labels))
        features = _embeddings(model, [*learned, *encoded.holdout], pad, device)
        chances = torch.full((len(truth), classes), 1e-6, dtype=torch.float64)
        if len(known) > 1:
            rival = LogisticRegression(C=10.0, max_iter=1000).fit(features[: len(learned)], labels)
            chances[:, known] += torch.from_numpy(rival.predict_proba(features[len(learned) :]))
        else:
            chances[:, known] += 1.0
        scores = _scores((chances / chances.sum(1, keepdim=True)).log(), truth)
        sentence = (
            f"A plain classifier (logistic regression) on the untouched model, learned from {len(learned):,} texts, "
            f"is right for {scores['eval_accuracy']:.1%} of the held-out texts."
        )
        return {"name": "a plain classifier on the untouched model", "sentence": sentence, **scores}


class Sorter(Predictor):
    """Says which label fits a text best, with the score of every label."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        config: Any = model.config
        self.labels = [label for _, label in sorted((int(place), label) for place, label in config.id2label.items())]
        reach = getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST
        self.length = min(int(reach), _LONGEST, int(tokenizer.model_max_length))

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Options: top, how many labels to list (all)."""
        self.refuse(inputs)
        top = int(options.get("top", len(self.labels)))
        examples = self._examples(inputs)
        device = next(self.model.parameters()).device
        if not examples:
            return []
        return self.answers(TASK._logits(self.model, examples, self.tokenizer.pad_token_id, device), top)

    def refuse(self, inputs: Sequence[Any]) -> None:
        """Raise when an input is no text."""
        if not all(isinstance(given, str) and given.strip() for given in inputs):
            raise bad_input(
                "inputs", "There is no text to sort.", "Each input is a text.", "Write a text.", "bad_prompt"
            )

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The texts as one batch on the model's device, in their order."""
        return moved(_batch(self._examples(texts), self.tokenizer.pad_token_id), next(self.model.parameters()).device)

    def _examples(self, texts: Sequence[str]) -> Examples:
        ids, _ = tokenized(texts, self.tokenizer, self.length)
        places = np.arange(len(ids) + 1)
        return Examples({"input_ids": ids, "labels": Ragged(np.zeros(len(ids), np.int32), places)}, places[:-1])

    @staticmethod
    def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, labels] of a batch, in fp32, with gradient."""
        return TASK.forward_logits(model, batch)[0].float()

    def answers(self, logits: Tensor, top: int | None = None) -> list[dict[str, Any]]:
        """Labels with their scores, the best first, for each row of logits."""
        answers = []
        for row in torch.softmax(logits, dim=-1).tolist():
            ranked = sorted(zip(row, self.labels, strict=True), key=lambda item: -item[0])
            scores = [{"label": label, "score": score} for score, label in ranked]
            shown = scores[: max(1, top)] if top is not None else scores
            answers.append({"label": scores[0]["label"], "score": scores[0]["score"], "scores": shown})
        return answers


def tokenized(texts: Sequence[str], tokenizer: Any, length: int) -> tuple[Ragged, int]:
    """Token ids with the tokenizer's own special tokens, and how many texts had to be cut to `length`."""
    ids = Tokens(tokenizer).rows(texts)
    long = np.flatnonzero(ids.lengths > length)
    if len(long):  # cut by the tokenizer, which keeps its end mark
        given = [texts[place] for place in long.tolist()]
        short = tokenizer(given, truncation=True, max_length=length, return_attention_mask=False)["input_ids"]
        order = np.arange(len(ids))
        order[long] = len(ids) + np.arange(len(long))
        ids = Ragged.joined([ids, Ragged.of(short)]).take(order)
    return ids, len(long)


def _batch(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    return {**padded_batch(rows_of(examples, "input_ids"), pad, len(examples)), "labels": _classes(examples)}


def _classes(examples: Sequence[Example]) -> Tensor:
    """The class of every example, [B]."""
    return torch.tensor([int(labels[0]) for labels in rows_of(examples, "labels")])


def _by_length(examples: Sequence[Example], device: torch.device) -> Iterator[list[int]]:
    lengths, size = lengths_of(examples), _EVAL_BATCH.get(device.type, 32)
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _scores(log_chances: Tensor, truth: Tensor) -> dict[str, float]:
    """Loss with its standard error, accuracy, and F1 averaged over the classes that occur."""
    from sklearn.metrics import f1_score

    losses = functional.nll_loss(log_chances.double(), truth, reduction="none")
    guessed = log_chances.argmax(-1)
    error = float(losses.std(correction=1)) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return {
        "eval_loss": float(losses.mean()),
        "eval_loss_se": error,
        "eval_accuracy": float((guessed == truth).double().mean()),
        "eval_macro_f1": float(f1_score(truth.numpy(), guessed.numpy(), average="macro", zero_division=0.0)),
    }


def _most_frequent(train: Sequence[Example], truth: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Always the most frequent label; its loss is that of stating every label's share (each counted once more)."""
    counts = Counter(_classes(train).tolist())
    shares = torch.tensor([counts[place] + 1.0 for place in range(len(labels))], dtype=torch.float64)
    scores = _scores((shares / shares.sum()).log().expand(len(truth), -1), truth)
    name = labels[int(shares.argmax())]
    return {
        "name": "the most frequent label",
        "sentence": f"Always answering '{name}' is right for {scores['eval_accuracy']:.1%} of the held-out texts.",
        **scores,
    }


def _embeddings(model: nn.Module, examples: Sequence[Example], pad: int, device: torch.device) -> np.ndarray[Any, Any]:
    """The mean of the last hidden states over the real tokens, at length one: [N, hidden]."""
    body = base_of(model)
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    with measuring(model):
        for indices in _by_length(examples, device):
            batch = moved(_batch(take(examples, indices), pad), device)
            hidden = body(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state.float()  # [B, T, H]
            mask = batch["attention_mask"][:, :, None].float()
            mean = functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0), dim=-1)
            for index, row in zip(indices, mean.cpu(), strict=True):
                found[index] = row
    return torch.stack(found).numpy()


TASK = Classify()
