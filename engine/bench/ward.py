"""The ward of the run doctor: tiny models, data that can be learned, sick runs of every kind, and healthy ones over many methods."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.control import Control
from engine.core.errors import EngineError
from engine.core.events import EventLog
from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.pretrain import train_tokenizer
from engine.ops.train import prepare
from engine.starters.corpus import dialogues, stories
from engine.train.clock import Clock
from engine.train.loop import train
from engine.train.parts import Look, Loss, Signal
from engine.train.run import Run

Sabotage = Callable[[Run], None]
Methods = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to be judged. rules: what the doctor should name, any of them; none for a healthy one."""

    name: str
    task: str
    data: str  # file in the ward
    methods: Methods
    settings: dict[str, Any]
    rules: frozenset[str] = frozenset()
    sabotage: Sabotage | None = None
    base: str = ""  # model in the ward; that of the task when empty


@dataclass(kw_only=True)
class Judged:
    """What the doctor said of a run: signals with the step at which they were given."""

    case: Case
    seed: int
    said: list[tuple[int, Signal]] = field(default_factory=list)
    steps: int = 0
    planned: int = 0
    scores: list[float] = field(default_factory=list)  # held-out losses in their order
    looks: list[Look] = field(default_factory=list)
    run: Run | None = None

    @property
    def warned(self) -> list[tuple[int, Signal]]:
        """Without notes."""
        return [(step, signal) for step, signal in self.said if signal.action != "note"]

    @property
    def hit(self) -> tuple[int, Signal] | None:
        """The first right warning."""
        return next(((step, signal) for step, signal in self.warned if signal.rule in self.case.rules), None)


class Ward:
    """A temporary folder with models and data; `judge(case, seed)` runs the real loop and collects what the doctor said."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="bonsai-ward-")
        self.folder = Path(self._home.name)
        self._count = 0
        self._texts()
        self._models()

    def close(self) -> None:
        self._home.cleanup()

    # ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _texts(self) -> None:
        rng = random.Random(11)
        told = [text[:170] for text in stories(21, 900)]
        self._write("stories", [{"text": text} for text in told])
        topics = topic_rows(rng, 720)
        self._write("topics", topics)
        self._write("lessons", [{**row, "label": f"about the {row['label']}"} for row in topic_rows(rng, 720)])
        self._write("topics-shuffled", shuffled_labels(topics, rng))
        alike = " ".join(["the same words"] * 8)
        self._write(
            "topics-cut", [{**row, "text": f"{alike} {row['text']}"} for row in topics]
        )  # alike up to where they are cut
        self._write("topics-few", shuffled_labels(topics[:90], rng))
        self._write("topics-repeated", shuffled_labels(topics[:72], rng) * 12)
        talks = [row for row in dialogues(22, 4000) if sum(len(turn["content"]) for turn in row["messages"]) < 110]
        self._write("talks", [dict(row) for row in talks])
        spoken = (" / ".join(turn["content"] for turn in row["messages"]) for row in dialogues(23, 640))
        self._write("speech", [{"text": text[-220:]} for text in spoken])
        self._write("stories-few", [{"text": text} for text in told[:40]])
        strange = [" ".join(str(rng.randrange(10)) * rng.randint(1, 4) for _ in range(24)) for _ in range(400)]
        self._write("strange", [{"text": text} for text in strange])
        mixed = [*told[:360], *("".join(rng.choice("qxzjkvwy ") for _ in range(60)) for _ in range(360))]
        self._write("mixed", [{"text": text} for text in mixed])

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with (self.folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def data(self, name: str) -> str:
        """The source of a data file."""
        found = next(self.folder.glob(f"{name}.*"))
        return f"file:{found}"

    # ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _models(self) -> None:
        from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

        tokenizer = train_tokenizer(stories(3, 200), 500)
        torch.manual_seed(0)
        shape = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
        encoder = BertConfig(
            **shape, vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id
        )
        BertModel(encoder).save_pretrained(self.folder / "blank")
        decoder = LlamaConfig(
            **shape, num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(decoder).save_pretrained(self.folder / "raw")
        for name in ("blank", "raw"):
            tokenizer.save_pretrained(self.folder / name)

    def school(self, name: str) -> None:
        """Teach a model something, once, so that there is something to forget and to build on."""
        if (self.folder / name).exists():
            return
        start, task, data, steps = LESSONS[name]
        case = Case(
            name="school", task=task, data=data, base=start, methods=[("full-finetuning", {}), ("linear", {})],
            settings={"learning_rate": 4e-3, "max_steps": steps, "epochs": 20, "batch_size": 16, "evaluations": 1},
        )  # fmt: skip
        run = self.prepared(case, 5)
        train(run)
        body: Any = getattr(run.model, "bert", run.model)  # of an encoder, without the head of these lessons
        body.save_pretrained(self.folder / name)
        run.tokenizer.save_pretrained(self.folder / name)

    # ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prepared(self, case: Case, seed: int) -> Run:
        """The run of a case, ready to start."""
        self._count += 1
        folder = self.folder / f"run-{os.getpid()}-{self._count}"
        folder.mkdir()
        base = case.base or ("encoder" if case.task == "classify" else "decoder")
        self.school(base)
        settings = {
            "batch_size": 8, "max_length": 48, "precision": "fp32", "evaluations": 8, "seed": seed, "holdout": 0.15, "frozen_cache": "off",
            "checkpoint_every": 1_000_000, **case.settings,
        }  # fmt: skip
        body = {
            "task": case.task, "model": {"source": f"folder:{self.folder / base}"}, "data": {"source": self.data(case.data)},
            "methods": [{"slug": slug, "params": params} for slug, params in case.methods], "settings": settings,
        }  # fmt: skip
        run = prepare(require(parse_recipe(body)), folder, EventLog(folder), Control(folder))
        if case.sabotage is not None:
            case.sabotage(run)
        return run

    def judge(self, case: Case, seed: int) -> Judged:
        """Run a case to its end, or to its crash, and keep what was said."""
        run = self.prepared(case, seed)
        run.save = lambda: None  # type: ignore[method-assign]  # nothing of these runs is kept
        judged = Judged(case=case, seed=seed, planned=run.clock.total_steps, run=run)
        tell, evaluate = run.tell, run.evaluate
        for watcher in run.slots.watchers:
            watcher.see = _heard(watcher.see, judged.looks)  # type: ignore[method-assign, assignment]

        def told(signals: list[Signal]) -> list[Signal]:
            judged.said.extend((run.clock.step, signal) for signal in signals)
            return tell(signals)

        def measured() -> dict[str, Any]:
            scores = evaluate()
            judged.scores.append(float(scores["eval_loss"]))
            return scores

        run.tell, run.evaluate = told, measured  # type: ignore[method-assign]
        try:
            train(run)
        except EngineError as error:
            if error.reason != "diverged":
                raise
        judged.steps = run.clock.step
        return judged


def _heard(see: Callable[[Look], Iterable[Signal]], looks: list[Look]) -> Callable[[Look], Iterable[Signal]]:
    """A watcher's `see` that keeps what it was shown."""

    def hear(look: Look) -> Iterable[Signal]:
        looks.append(look)
        return see(look)

    return hear


LESSONS = {"decoder": ("raw", "causal_lm", "stories", 260), "encoder": ("blank", "classify", "lessons", 220)}
TOPICS = {
    "sea": ["boat", "wave", "fish", "harbour", "sail", "salt"],
    "field": ["wheat", "plough", "corn", "barn", "hay", "mill"],
    "wood": ["pine", "axe", "owl", "moss", "trunk", "fox"],
    "town": ["market", "bell", "street", "shop", "square", "lamp"],
}


def topic_rows(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Short texts about four topics: two or three telling words among ordinary ones, one label in thirty wrong."""
    plain = [
        "the",
        "a",
        "old",
        "new",
        "small",
        "they",
        "went",
        "and",
        "saw",
        "one",
        "day",
        "near",
        "with",
        "some",
        "good",
        "red",
        "long",
        "then",
        "came",
        "home",
    ]
    rows = []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        words = [*rng.choices(plain, k=rng.randint(5, 9)), *rng.choices(TOPICS[topic], k=rng.randint(2, 3))]
        rng.shuffle(words)
        label = rng.choice(list(TOPICS)) if rng.random() < 1 / 30 else topic
        rows.append({"text": " ".join(words), "label": label})
    return rows


def shuffled_labels(rows: Sequence[Mapping[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """The same texts and labels, joined at random."""
    labels = [row["label"] for row in rows]
    rng.shuffle(labels)
    return [{"text": row["text"], "label": label} for row, label in zip(rows, labels, strict=True)]


# ── sabotage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def poisoned(at: int, make: Callable[[Tensor], Tensor]) -> Sabotage:
    """From step `at` on the loss of every micro-batch goes through `make`."""

    def apply(run: Run) -> None:
        original = run.objective.loss

        def loss(model: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator) -> Loss:
            found = original(model, batch, rng)
            return Loss(make(found.total), found.weight) if run.clock.step >= at else found

        run.objective.loss = loss  # type: ignore[method-assign]

    return apply


class _Gradient(torch.autograd.Function):
    """Passes a number on and gives back a gradient that is none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        return value * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * math.nan, None


def no_number(total: Tensor) -> Tensor:
    """NaN forward and backward, as an empty row gives."""
    return total * math.nan


def bad_gradient(total: Tensor) -> Tensor:
    """A sound loss whose gradient is NaN, as an overflow on the way back gives."""
    return _Gradient.apply(total, 1.0)  # type: ignore[no-any-return, no-untyped-call]


def zero_with_bad_gradient(total: Tensor) -> Tensor:
    """A loss of zero whose gradient is NaN, as a mean over nothing gives."""
    return _Gradient.apply(total, 0.0)  # type: ignore[no-any-return, no-untyped-call]


def rate_from(at: int, factor: float) -> Sabotage:
    """The learning rate grows by `factor` at a step."""

    def apply(run: Run) -> None:
        original = run.schedule.factor
        run.schedule.factor = lambda clock: original(clock) * (factor if clock.step >= at else 1.0)  # type: ignore[method-assign]

    return apply


def masked(share: float) -> Sabotage:
    """No item of this share of the batches is supervised."""

    def apply(run: Run) -> None:
        original, rng = run._collate, random.Random(run.settings.seed)

        def collate(indices: list[int]) -> dict[str, Tensor]:
            batch = original(indices)
            return {**batch, "labels": torch.full_like(batch["labels"], -100)} if rng.random() < share else batch

        run._collate = collate  # type: ignore[method-assign]

    return apply


def only_the_end(run: Run) -> None:
    """Of every answer only its last token, always the same mark, is supervised; when measuring too."""

    def cut(examples: Any) -> None:
        labels = examples.columns["labels"] if hasattr(examples, "columns") else None
        if labels is None:
            raise TypeError("These examples hold no columns.")
        flat = labels.flat.copy()
        for start, end in zip(labels.starts[:-1].tolist(), labels.starts[1:].tolist(), strict=True):
            known = [place for place in range(start, end) if flat[place] != -100]
            flat[known[:-1]] = -100
        examples.columns["labels"] = type(labels)(flat, labels.starts)

    cut(run.encoded.train)
    if run.encoded.holdout.columns is not run.encoded.train.columns:  # type: ignore[attr-defined]
        cut(run.encoded.holdout)


def ordered(key: Callable[[Any], Any], *, inside: bool = False) -> Sabotage:
    """Examples come in the order of `key` in every pass."""

    def apply(run: Run) -> None:
        order = sorted(range(len(run.encoded.train)), key=lambda place: key(run.encoded.train[place]))
        run._ordered = lambda epoch: list(order)  # type: ignore[method-assign]

    return apply


def by_label(example: Any) -> Any:
    """Class by class."""
    return example.labels[0]


def by_source(example: Any) -> Any:
    """In the order of the file."""
    return example.source


def zero_adapter(run: Run) -> None:
    """Both sides of every adapter are zero."""
    with torch.no_grad():
        for name, parameter in run.trainables.items():
            if not name.startswith("fresh."):
                parameter.zero_()


def frozen_adapter(run: Run) -> None:
    """What should learn asks for no gradient."""
    for name, parameter in run.trainables.items():
        if not name.startswith("fresh."):
            parameter.requires_grad_(False)


def detached_body(run: Run) -> None:
    """The head learns from a body that is cut off."""
    body = next(child for name, child in run.model.named_children() if "classif" not in name and "dropout" not in name)

    def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
        for key, value in list(output.items()):
            if isinstance(value, Tensor):
                output[key] = value.detach().requires_grad_(True)
        return output

    body.register_forward_hook(cut)


def decayed(amount: float) -> Sabotage:
    """The optimizer pulls what learns towards zero."""

    def apply(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["weight_decay"] = amount

    return apply


def dropped(share: float) -> Sabotage:
    """Every dropout of the model drops this share."""

    def apply(run: Run) -> None:
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = share

    return apply


def thrown(at: int, size: float) -> Sabotage:
    """One wild correction at a step, and hardly any afterwards."""

    def apply(run: Run) -> None:
        original = run.schedule.factor

        def factor(clock: Clock) -> float:
            return size if clock.step == at else original(clock) * (0.02 if clock.step > at else 1.0)

        run.schedule.factor = factor  # type: ignore[method-assign]

    return apply


def stuck(run: Run) -> None:
    """Every step reads the first batch."""
    original = run.next_batches
    kept: list[dict[str, Tensor]] = []

    def same() -> list[dict[str, Tensor]]:
        found = original()
        if not kept:
            kept.extend(found)
        return list(kept)

    run.next_batches = same  # type: ignore[method-assign]


# ── cases ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

FULL: Methods = [("full-finetuning", {}), ("clip", {}), ("constant", {})]
LORA: Methods = [("lora", {"r": 8, "alpha": 16, "targets": "all-linear"}), ("clip", {}), ("constant", {})]
NON_FINITE = frozenset({"not-finite"})
HIGH = frozenset({"rate-too-high", "not-finite", "loss-broke"})
LOW = frozenset({"rate-too-low"})
HEART = frozenset({"over-fit", "by-heart", "epoch-jumps"})


def sick_cases() -> Iterator[Case]:
    """One of every kind."""

    def classify(name: str, rules: set[str] | frozenset[str], sabotage: Sabotage | None = None, *, data: str = "topics", methods: Methods = FULL,
                 base: str = "", **settings: Any) -> Case:  # fmt: skip
        return Case(name=name, task="classify", data=data, methods=methods, sabotage=sabotage, rules=frozenset(rules), base=base,
                    settings={"learning_rate": 1e-3, "epochs": 2, "max_steps": 120, **settings})  # fmt: skip

    def language(name: str, rules: set[str] | frozenset[str], sabotage: Sabotage | None = None, *, data: str = "stories", methods: Methods = FULL,
                 task: str = "causal_lm", base: str = "", **settings: Any) -> Case:  # fmt: skip
        return Case(name=name, task=task, data=data, methods=methods, sabotage=sabotage, rules=frozenset(rules), base=base,
                    settings={"learning_rate": 1e-3, "epochs": 2, "max_steps": 90, **settings})  # fmt: skip

    free: Methods = [("full-finetuning", {}), ("constant", {})]
    yield classify("rate × 100, classes", HIGH, learning_rate=0.1)
    yield language("rate × 100, language", HIGH, learning_rate=0.1)
    yield language("rate × 1000, LoRA", HIGH, methods=LORA, learning_rate=5.0)
    yield classify("rate / 1000, classes", LOW, learning_rate=1e-6)
    yield language("rate / 1000, LoRA", LOW, methods=LORA, learning_rate=2e-6, task="instruct", data="talks")
    yield language("high rate without warm-up", HIGH, methods=free, learning_rate=3e-2)
    yield classify("not a number in the data", NON_FINITE, poisoned(30, no_number))
    yield language("gradient not a number", NON_FINITE, poisoned(25, bad_gradient), methods=LORA)
    yield language("zero loss, gradient not a number", NON_FINITE, poisoned(20, zero_with_bad_gradient))
    yield classify("explodes late", HIGH | {"loss-shift"}, rate_from(60, 200.0))
    yield language("all labels masked", {"nothing-to-learn"}, masked(1.0), task="instruct", data="talks")
    yield language("six of ten batches masked", {"nothing-to-learn"}, masked(0.6), task="instruct", data="talks")
    yield classify("labels shuffled", {"plateau", "one-answer", *HEART}, data="topics-shuffled")
    yield classify(
        "sorted by class", {"sorted-data", "loss-shift", "loss-broke"}, ordered(by_label), epochs=3, max_steps=230
    )
    yield language(
        "sorted by source",
        {"sorted-data", "loss-shift", "loss-broke"},
        ordered(by_source),
        data="mixed",
        epochs=3,
        max_steps=230,
    )
    yield language("shift in the data", {"loss-shift", "loss-broke"}, ordered(by_source), data="mixed", epochs=1)
    yield classify(
        "repeated rows learned by heart",
        HEART,
        data="topics-repeated",
        epochs=4,
        max_steps=240,
        learning_rate=2e-3,
    )
    yield classify("few rows learned by heart", HEART, data="topics-few", epochs=25, max_steps=240, learning_rate=2e-3)
    yield language(
        "few texts learned by heart",
        HEART,
        data="stories-few",
        epochs=60,
        max_steps=200,
        learning_rate=4e-3,
        holdout=0.3,
    )
    yield language("adapter zero on both sides", {"no-gradient", "idle-parts"}, zero_adapter, methods=LORA)
    yield classify("adapter zero on both sides, classes", {"idle-parts"}, zero_adapter, methods=LORA)
    yield classify("frozen by mistake", {"idle-parts"}, frozen_adapter, methods=LORA)
    yield classify("body detached", {"idle-parts"}, detached_body)
    yield language("wrong loss mask", {"too-easy"}, only_the_end, task="instruct", data="talks", epochs=1)
    yield classify(
        "one example at a time", {"too-noisy", "unsteady", *HIGH}, batch_size=1, learning_rate=1e-2, max_steps=160
    )
    yield language(
        "clipped to nothing",
        {"clip-too-small"},
        methods=[("full-finetuning", {}), ("clip", {"max_norm": 1e-3}), ("constant", {})],
    )
    yield language("forgets", {"forgetting"}, data="strange", learning_rate=4e-3)
    yield classify("plateau after a collapse", HIGH | {"loss-shift"}, thrown(60, 100.0))
    yield language("absurd weight decay", {"weights-fade", *HIGH}, decayed(20.0), learning_rate=3e-3)
    yield classify(
        "dropout of nine tenths",
        {"train-above-heldout"},
        dropped(0.9),
        learning_rate=2e-3,
        epochs=3,
        max_steps=200,
    )
    yield classify("constant input", {"plateau", "one-answer"}, data="topics-cut", max_length=16)
    yield language("the same batch in every step", {"same-batch", *HEART}, stuck, methods=LORA, learning_rate=5e-3)


TAIL: Methods = [("clip", {}), ("cosine", {})]
LEARNERS: dict[str, tuple[Methods, float]] = {
    "full": ([("full-finetuning", {})], 1e-3),
    "LoRA": ([("lora", {"r": 8, "alpha": 16})], 5e-3),
    "PaCA": ([("paca", {"r": 8, "alpha": 8})], 3e-3),
    "HFT": ([("hft", {})], 1e-3),
    "IncreLoRA": ([("increlora", {})], 5e-3),
    "bias and norm": ([("bias-norm-tuning", {})], 1e-2),
    "SaRA": ([("sara", {})], 2e-3),
    "ScaleLoRA": ([("scalelora", {})], 5e-3),
}


def healthy_cases() -> Iterator[Case]:
    """Ordinary runs over methods, goals, rates and batch sizes."""
    for title, (methods, rate) in LEARNERS.items():
        for task, data in (("classify", "topics"), ("causal_lm", "speech"), ("instruct", "talks")):
            for factor, batch in ((1.0, 8), (0.4, 4)):
                yield Case(
                    name=f"{title}, {task}, rate {rate * factor:g}, {batch} at a time", task=task, data=data, methods=[*methods, *TAIL],
                    settings={"learning_rate": rate * factor, "batch_size": batch, "epochs": 2, "max_steps": 100 if batch == 8 else 130},
                )  # fmt: skip
    for title in ("full", "LoRA", "PaCA"):
        methods, rate = LEARNERS[title]
        yield Case(
            name=f"{title}, classify, 16 at a time, four passes", task="classify", data="topics", methods=[*methods, ("linear", {})],
            settings={"learning_rate": rate, "batch_size": 16, "epochs": 4},
        )  # fmt: skip
        yield Case(
            name=f"{title}, instruct, added up, no clipping", task="instruct", data="talks", methods=[*methods, ("constant", {})],
            settings={"learning_rate": rate * 0.5, "batch_size": 2, "accumulate": 4, "epochs": 2},
        )  # fmt: skip
    for batch in (16, 12):
        yield Case(
            name=f"stories from nothing, {batch} at a time", task="causal_lm", data="stories", methods=[*LEARNERS["full"][0], *TAIL], base="raw",
            settings={"learning_rate": 4e-3, "batch_size": batch, "epochs": 2, "max_length": 64, "max_steps": 120},
        )  # fmt: skip


def taught_cases() -> Iterator[Case]:
    """Runs on the very texts that the model was taught with: nothing is left to learn, and nothing is wrong with the run either."""
    for title, (methods, rate) in LEARNERS.items():
        yield Case(
            name=f"{title}, taught texts", task="causal_lm", data="stories", methods=[*methods, *TAIL],
            settings={"learning_rate": rate, "epochs": 2, "max_steps": 100},
        )  # fmt: skip
