"""What the drivers of *transform*, *generate*, *probe*, *flow* and *search* share: the context of a job, its inputs, and how a result is written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import __version__
from engine.core.artifact import seal
from engine.core.control import Control, write_json
from engine.core.events import EventLog
from engine.core.facts import Facts
from engine.core.method import Chosen
from engine.core.recipe import Recipe
from engine.core.work import Report
from engine.io.facts import model_facts
from engine.io.tensors import save_tensors
from engine.ops.check import Checked
from engine.tasks import task as task_named
from engine.tasks.base import Encoded, Row, Task
from engine.tasks.cache import encoded_data
from engine.tasks.examples import take
from engine.train.export import ARTIFACT, NUM_REFERENCE, certify_in_clean_process
from engine.train.parts import seeded
from engine.train.run import Ending, seed_everything


class Interrupted(Exception):
    """A person asked to pause, stop or cancel; raised at a border where nothing is lost."""

    def __init__(self, request: str) -> None:
        super().__init__(request)
        self.request = request


class Inputs:
    """The models and the data of a recipe, loaded when they are first asked for."""

    def __init__(self, recipe: Recipe, facts: Facts, say: Callable[[str], None] = lambda note: None) -> None:
        self.recipe, self.facts, self.say = recipe, facts, say
        self.task: Task = task_named(recipe.task)
        self.device = torch.device(facts.machine.device)

    def load_model(self, index: int = 0) -> nn.Module:
        """A fresh copy of an input model in fp32 and eval mode; 0 is `recipe.model`, 1 the first of `recipe.models`."""
        facts = (self.facts.model, *self.facts.models)[index]
        seed_everything(self.recipe.settings.seed)
        model = self.task.load_model(facts, self.facts.data, dtype=torch.float32, seed=self.recipe.settings.seed)
        return model.to(self.device).eval()

    def load_folder(self, folder: Path) -> nn.Module:
        """A model folder that this job has written, loaded like an input."""
        facts = model_facts(f"folder:{folder}", task=self.recipe.task)
        model = self.task.load_model(facts, self.facts.data, dtype=torch.float32, seed=self.recipe.settings.seed)
        return model.to(self.device).eval()

    @cached_property
    def model(self) -> nn.Module:
        """The first input model."""
        return self.load_model(0)

    @cached_property
    def tokenizer(self) -> Any:
        return self.task.load_tokenizer(self.facts.model)

    @cached_property
    def rows(self) -> Sequence[Row]:
        """All rows of the data, role → value."""
        if "encoded" in self.__dict__:
            return self.encoded.rows
        return list(self.task.rows(self.facts.data)) if self.recipe.data is not None else []

    @cached_property
    def encoded(self) -> Encoded:
        """Training and held-out examples, split and cut as a training run would."""
        return encoded_data(self.task, self.tokenizer, self.recipe, self.facts, self.say)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """The task's scores of a model on the held-out examples."""
        return self.task.evaluate(model, self.encoded, self.tokenizer, self.recipe, self.device)

    def calibration(self, num: int, length: int | None = None) -> list[dict[str, Tensor]]:
        """Micro-batches of at most `num` training examples, never of held-out ones, on the device; cut to `length` tokens."""
        order = torch.randperm(len(self.encoded.train), generator=seeded(self.recipe.settings.seed, "calibration"))
        chosen = take(self.encoded.train, order[:num].tolist())
        settings = self.recipe.settings.model_copy(update={"packing": False})
        plain = self.recipe.model_copy(update={"settings": settings})
        batches = []
        for start in range(0, len(chosen), 8):
            batch = self.task.collate(chosen[start : start + 8], self.tokenizer, plain)
            if length is not None:
                batch = {key: value[:, :length] if value.dim() == 2 else value for key, value in batch.items()}
            batches.append({key: value.to(self.device) for key, value in batch.items()})
        return batches


class WorkContext:
    """What a method may use and say while it works: a report that stays with the result, notes, progress, generators, the inputs."""

    def __init__(
        self, recipe: Recipe, facts: Facts, lead: Chosen, folder: Path, log: EventLog | None, control: Control | None
    ) -> None:
        self.recipe, self.facts, self.lead, self.folder = recipe, facts, lead, folder
        self.params = lead.params
        self.seed = recipe.settings.seed
        self.report: dict[str, Any] = {}
        self.notes: list[str] = []
        self.inputs = Inputs(recipe, facts, self._tell)
        self.task = self.inputs.task
        self.place = ""  # of the item that is worked on
        self._log, self._control = log, control
        self._last, self._began = 0.0, time.monotonic()

    @property
    def tokenizer(self) -> Any:
        return self.inputs.tokenizer

    def load_model(self, index: int = 0) -> nn.Module:
        """A fresh copy of an input model in fp32 and eval mode."""
        return self.inputs.load_model(index)

    def calibration(self, num: int, length: int | None = None) -> list[dict[str, Tensor]]:
        """Micro-batches of training examples."""
        return self.inputs.calibration(num, length)

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator from (seed, slug, item, name)."""
        return seeded(self.seed, self.lead.slug, self.place, name)

    def note(self, sentence: str, level: str = "info") -> None:
        """Say something to the person who watches."""
        self.notes.append(sentence)
        self._tell(sentence, level)

    def _tell(self, sentence: str, level: str = "info") -> None:
        if self._log is not None:
            self._log.emit("log", {"level": level, "message": sentence})

    def progress(self, done: int, total: int) -> None:
        """Say how far the work is (at most twice a second), and obey requests: a border at which the job may be left."""
        now = time.monotonic()
        if self._log is not None and (done >= total or now - self._last >= 0.5):
            self._last = now
            eta = (now - self._began) / done * (total - done) if done else None
            self._log.emit(
                "progress",
                {
                    "done_steps": done,
                    "total_steps": total,
                    "fraction": round(done / max(1, total), 4),
                    "eta_seconds": None if eta is None else round(eta, 1),
                },
                step=done,
            )
        self.poll()

    def poll(self) -> None:
        """Obey a request of a person, if there is one."""
        request = self._control.poll() if self._control is not None else None
        if request is not None and request != "save":
            raise Interrupted(request)


def leave(error: Interrupted) -> Ending:
    """How a job ends that a person interrupted."""
    if error.request == "pause":
        return Ending(reason="paused", message="Paused; finished pieces are kept, and it can go on.")
    return Ending(reason="cancelled", message="Cancelled; no result was written.")


def describe_work(
    checked: Checked, lead: Chosen, *, kind: str, ending: Ending, forms: dict[str, str], seconds: float, **more: Any
) -> dict[str, Any]:
    """The content of artifact.json for a result that no training loop made; the same keys as `engine.train.export.describe`."""
    recipe, facts = checked.recipe, checked.facts
    assert facts is not None
    data = {**asdict(facts.data), "num_train": 0, "num_holdout": 0}
    description: dict[str, Any] = {
        "kind": kind,
        "engine": __version__,
        "operation": recipe.operation,
        "name": recipe.name,
        "task": recipe.task,
        "methods": [
            {
                "slug": chosen.slug,
                "title": chosen.method.card.title,
                "version": chosen.method.version,
                "params": chosen.params.model_dump(mode="json"),
                "default": chosen.index is None,
            }
            for chosen in dict.fromkeys((lead, *checked.composition.chosen))
        ],
        "fingerprint": recipe.fingerprint(),
        "parents": [recipe.model.source, *(ref.source for ref in recipe.models)],
        "base": {
            "source": facts.model.source,
            "family": facts.model.family,
            "architecture": facts.model.architecture,
            "num_parameters": facts.model.num_parameters,
        },
        "data": data,
        "ending": asdict(ending),
        "best_step": None,
        "used_best": False,
        "metrics": {},
        "before": {},
        "baseline": {},
        "samples": [],
        "forms": forms,
        "notes": [],
        "num_trainable": 0,
        "steps": 0,
        "seconds": round(seconds, 2),
        "tokens": 0,
        "precision": "fp32",
        "seed": recipe.settings.seed,
    }
    return {**description, **more}


def write_artifact(
    folder: Path,
    recipe: Recipe,
    description: dict[str, Any],
    log: EventLog,
    fill: Callable[[Path], None],
    *,
    certify: bool = True,
) -> Path:
    """Write an artifact beside its place, seal it, rename it, certify it when it holds a model; returns its folder."""
    target, beside = folder / ARTIFACT, folder / f".{ARTIFACT}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    fill(beside)
    write_json(beside / "artifact.json", description)
    (beside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if not (beside / "README.md").exists():
        (beside / "README.md").write_text(work_card(description), encoding="utf-8")
    seal(beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    if certify:
        certify_artifact(target, log)
    return target


def certify_artifact(folder: Path, log: EventLog) -> None:
    """Certify an artifact (its hashes, and every form that holds weights) and say so in the log."""
    forms = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))["forms"]
    certificate = certify_in_clean_process(folder)
    said = {"path": ARTIFACT, "forms": sorted(forms), "certificate": "pass" if certificate.get("ok") else "fail"}
    log.emit("artifact", said)


@torch.no_grad()
def write_reference(inputs: Inputs, model: nn.Module, folder: Path) -> None:
    """Held-out inputs (or fixed general texts, without data) and the logits of a model on them."""
    from engine.tasks.batching import plain_batch
    from engine.tasks.language import LanguageTask, general_examples

    tensors: dict[str, Tensor] = {}
    if inputs.recipe.data is not None:
        examples = inputs.encoded.holdout[:NUM_REFERENCE]
    elif isinstance(inputs.task, LanguageTask):
        examples = general_examples(inputs.tokenizer)[:NUM_REFERENCE]
    else:
        examples = []
    for number, start in enumerate(range(0, len(examples), 8)):
        batch = plain_batch(examples[start : start + 8], inputs.tokenizer.pad_token_id or 0)
        if inputs.recipe.data is not None:
            settings = inputs.recipe.settings.model_copy(update={"packing": False})
            plain = inputs.recipe.model_copy(update={"settings": settings})
            batch = inputs.task.collate(examples[start : start + 8], inputs.tokenizer, plain)
        on_device = {key: value.to(inputs.device) for key, value in batch.items()}
        logits, _ = inputs.task.forward_logits(model, on_device)
        tensors.update({f"{number}/{key}": value for key, value in batch.items()})
        tensors[f"{number}/logits"] = logits.float().cpu()
    save_tensors(folder / "reference.safetensors", tensors)


def report_json(report: Report) -> dict[str, Any]:
    """A report as JSON, with numbers that are not finite written as null."""
    from engine.core.events import finite

    body: dict[str, Any] = finite(asdict(report))
    return body


def work_card(description: Mapping[str, Any]) -> str:
    """README.md of a result that no training loop made."""
    lines = ["---", "tags: [bonsai-studio]", "---", "", f"# {description['name'] or 'A result of Bonsai Studio'}", ""]
    methods = ", ".join(m["title"] for m in description["methods"] if not m["default"])
    lines += [f"Made with {methods} from {', '.join(f'`{p}`' for p in description['parents'])}.", ""]
    lines += [description["ending"]["message"], ""]
    report = description.get("report")
    if report and report.get("table"):
        lines += [*table_lines(report["table"]), ""]
    for note in description["notes"]:
        lines.append(f"- {note}")
    lines += ["", "- `recipe.yaml`: everything needed to make it again", ""]
    return "\n".join(lines)


def table_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value).replace("|", "\\|")
