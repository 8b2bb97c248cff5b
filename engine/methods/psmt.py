"""Parameter-selective mean teacher: a classifier that goes on learning, without labels, while it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal, cast

from torch import nn

from engine.core.errors import bad_input
from engine.core.facts import DataFacts
from engine.core.method import Card, Cost, Figure, Needs, PredictMethod
from engine.core.params import HyperParams, dial
from engine.parts.teaching import MeanTeacher, Teaching
from engine.tasks.base import Predictor, Task


class LearningPredictor(Predictor):
    """Answers like the task's own predictor, with the sum of teacher and student, and learns from every full batch of what it was asked."""

    def __init__(self, model: nn.Module, tokenizer: Any, data: DataFacts, task: Task, params: Any) -> None:
        self.params = params
        self.plain = cast(Any, task.predictor(model, tokenizer, data))
        self.device = next(model.parameters()).device
        teaching = Teaching(
            form=params.form,
            learning_rate=params.learning_rate,
            momentum=params.momentum,
            quantile=params.quantile,
            anchor=params.anchor,
            anchor_to=params.anchor_to,
            restore=params.restore,
            seed=params.seed,
        )
        self.teacher = MeanTeacher(model, self.plain.logits, teaching)
        self.waiting: list[str] = []
        self._data, self._task = data, task

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """The answers of the task's predictor; {"learned_from": n} stands beside each, the number of texts learned from so far."""
        self._calibrate()
        answers: list[dict[str, Any]] = []
        for start in range(0, len(inputs), self.params.batch_size):
            texts = list(inputs[start : start + self.params.batch_size])
            self.plain.refuse(texts)
            answers += self.plain.answers(self.teacher.answer(self.plain.batch(texts)))
            self.waiting += texts
            while len(self.waiting) >= self.params.batch_size:
                batch, self.waiting = self.waiting[: self.params.batch_size], self.waiting[self.params.batch_size :]
                self.teacher.step(self.plain.batch(batch))
        seen = self.teacher.num_steps * self.params.batch_size
        return [{**answer, "learned_from": seen} for answer in answers]

    def _calibrate(self) -> None:
        """Fisher weights from examples the model was trained on; taken once, kept with the state."""
        if self.teacher.fisher or (self.params.anchor == 0 and self.params.form == "code"):
            return
        rows = islice(self._task.rows(self._data), self.params.fisher_samples)
        texts = [str(row["text"]) for row in rows]
        if not texts:
            raise bad_input(
                "data",
                "The examples that this model was trained on are gone.",
                "They are needed once, to see which of its numbers matter.",
                "Set the anchor to 0 with the form 'code', or train again.",
                "no_examples",
            )
        self.teacher.measure_fisher(self.plain.batch([text]) for text in texts)

    def reset(self) -> None:
        self.teacher.reset()
        self.waiting = []

    def state_dict(self) -> dict[str, Any]:
        return {**self.teacher.state_dict(), "waiting": list(self.waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.waiting = list(state["waiting"])
        self.teacher.load_state_dict(state)

    def status(self) -> dict[str, Any]:
        return {
            "batches": self.teacher.num_steps,
            "learned_from": self.teacher.num_steps * self.params.batch_size,
            "waiting": len(self.waiting),
            "share_moved": round(self.teacher.share_moved(), 4),
        }


class PSMT(PredictMethod):
    """Parameter-selective mean teacher, as the paper words it and as its released code does it."""

    card = Card(
        slug="psmt",
        title="Go on learning while answering (PSMT)",
        pick_when="Pick this when a finished classifier meets texts that slowly change, nobody labels them, and it should keep up without unlearning what "
        "it knew.",
        summary="The model is asked as usual. From every full batch of questions a copy of it, the student, learns to agree with a slower copy, the "
        "teacher; numbers that matter are held back. Everything can be undone with one press.",
        paper="Parameter-Selective Continual Test-Time Adaptation",
        year=2024,
        arxiv="2407.02253",
        algorithm=(
            "Student and teacher start as copies of the model; batch norm always uses the statistics of the batch.",
            "Answer a batch with teacher logits + student logits, from before any change.",
            "Loss: symmetric cross-entropy between student and teacher, plus anchor × Σ F (student − anchor weights)², F the squared gradients on the "
            "examples it was trained on.",
            "Form 'code' (the released program): Adam step; teacher ← a × teacher + (1 − a) × student; the 3 % of entries with the smallest squared "
            "gradient of this batch go back to the source in the student, and the teacher copies them, while it averages the others once more.",
            "Form 'paper': Adam step; the teacher keeps the entries with the largest F as they are and averages the others.",
        ),
        avoid_when="Questions come one by one or all of one kind: the student then learns from its own guesses about one label. Or labels can be had: "
        "train again instead.",
        traps=(
            "The two forms are different methods: the paper keeps the most important weights of the teacher, the program resets the least important of "
            "the student and averages twice (an effective momentum of a²).",
            "A pull towards the weights of the step before has no gradient at all; towards those of one step earlier it does not stop a slow drift. "
            "Anchor to the source instead.",
            "F from gradients averaged over a batch is far too small to hold anything; here it is taken example by example.",
            "The example configurations of the released program name another method (CoTTA); its numbers must not be taken for this one.",
            "At the sizes measured here the plain mean teacher and a random restore of 1 % were better than either form.",
        ),
        figures=(Figure(claim="ImageNet-C, CIFAR-C, error under changing corruption", paper="best of the methods compared (abstract; unconfirmed)",
                ours="digits under six corruptions, right answers: frozen 52 %, batch statistics 81 %, code form 82 %, mean teacher 83 %, CoTTA's restore 83 %"),),
        cost=Cost(time=4, memory=5, size=5),
        family="Serving",
    )  # fmt: skip
    needs = Needs(tasks=("classify",))
    presets = {
        "tiny": {"batch_size": 4, "fisher_samples": 8},
        "paper": {"form": "paper", "batch_size": 200, "fisher_samples": 10_000, "anchor_to": "previous"},
    }

    class Params(HyperParams):
        """Hyperparameters of parameter-selective mean teacher."""

        form: Literal["code", "paper"] = dial(
            "code", label="Which form", paper="paper", tier="basic",
            help="'code' is what the released program does and stayed stable in our measurements; 'paper' is what the text says.",
        )  # fmt: skip
        learning_rate: float = dial(
            1e-3, label="Learning rate", unit="1", low=0.0, high=0.1, paper=1e-3, help="How big a correction the student makes after each batch.",
        )  # fmt: skip
        batch_size: int = dial(
            32, label="Questions at a time", unit="texts", low=1, high=1024, tier="basic", paper=200,
            help="It learns when this many questions have come; fewer are answered and wait.",
        )  # fmt: skip
        momentum: float = dial(
            0.999, label="Slowness of the teacher", unit="1", low=0.0, high=1.0, paper=0.999,
            help="How much of itself the teacher keeps at each step; smaller follows faster, for short streams.",
        )  # fmt: skip
        quantile: float = dial(
            0.03, label="Share held back", unit="share", low=0.0, high=1.0, paper=0.03,
            help="The share of the numbers that are held back in each step.",
        )  # fmt: skip
        anchor: float = dial(
            500.0, label="Pull to the anchor", unit="1", low=0.0, high=1e9, paper=500,
            help="How strongly important numbers are pulled back; it is multiplied with their importance, which is small.",
        )  # fmt: skip
        anchor_to: Literal["source", "previous"] = dial(
            "source", label="Anchor", paper="previous", help="'source' pulls towards the model as it was trained, 'previous' towards the step before the last.",
        )  # fmt: skip
        restore: float = dial(
            0.0, label="Restored at random", unit="share", low=0.0, high=1.0, paper=0.0,
            help="This share of the student's numbers goes back to the trained model after each step (the rule of CoTTA).",
        )  # fmt: skip
        fisher_samples: int = dial(
            256, label="Examples for importance", unit="examples", low=1, high=100_000, paper=10_000,
            help="How many examples of the training data are read once to see which numbers matter.",
        )  # fmt: skip
        seed: int = dial(17, label="Seed", unit="1", low=0, high=2**31 - 1, help="Of the random choices.")

    def predictor(self, model: nn.Module, tokenizer: Any, data: DataFacts, task: Task) -> Predictor:
        return LearningPredictor(model, tokenizer, data, task, self.params)
