"""The *flow* operation: a method plans steps, each a recipe of its own; finished steps are read from the disk when the flow goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.core.compose_work import inner_recipe
from engine.core.control import Control, write_json
from engine.core.errors import EngineError
from engine.core.events import EventLog
from engine.core.recipe import DataRef, MethodRef, ModelRef, Operation, Recipe, TrainSettings
from engine.core.work import Outcome, Step, StepResult
from engine.ops.check import Checked, require
from engine.ops.folder import driver
from engine.ops.nested import NestedLog, last_row, result_of, take_home
from engine.ops.work import WorkContext
from engine.train import checkpoint
from engine.train.run import Ending

STEPS, DONE = "steps", "done.json"
Methods = Sequence[tuple[str, Mapping[str, Any]]]


class FlowContext(WorkContext):
    """What a flow plans with: its inputs, notes and generators, and short ways to write the recipes of its steps."""

    @property
    def inner(self) -> Recipe:
        """The training recipe that stands inside of the flow's own."""
        return inner_recipe(self.recipe, self.lead)

    def train(
        self,
        methods: Methods | None = None,
        *,
        model: ModelRef | None = None,
        data: DataRef | None = None,
        task: str | None = None,
        name: str = "",
        **settings: Any,
    ) -> Recipe:
        """A training recipe: the flow's own settings and inner methods, with what is given here in their place. A setting of None is suggested anew."""
        return self._recipe("train", methods, (model,), data, task, name, settings)

    def transform(
        self,
        slug: str,
        params: Mapping[str, Any] | None = None,
        *,
        models: Sequence[ModelRef] = (),
        data: DataRef | None = None,
    ) -> Recipe:
        """A recipe that makes new weights of `models` (default: the flow's own), measured on the flow's data."""
        return self._recipe("transform", [(slug, params or {})], models or (None,), data, None, "", {})

    def generate(
        self,
        slug: str,
        params: Mapping[str, Any] | None = None,
        *,
        model: ModelRef | None = None,
        data: DataRef | None = None,
        **settings: Any,
    ) -> Recipe:
        """A recipe that makes data."""
        return self._recipe("generate", [(slug, params or {})], (model,), data, None, "", settings)

    def probe(
        self,
        slug: str,
        params: Mapping[str, Any] | None = None,
        *,
        model: ModelRef | None = None,
        data: DataRef | None = None,
    ) -> Recipe:
        """A recipe that measures."""
        return self._recipe("probe", [(slug, params or {})], (model,), data, None, "", {})

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> DataRef:
        """Rows as a data file of this job, to be an input of a step."""
        path = self.folder / STEPS / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".tmp")
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
        return DataRef(source=f"file:{path}")

    def forget(self, result: StepResult) -> None:
        """Drop the weights of a step that nothing needs any more, its checkpoints and merged model; its numbers and its small files stay."""
        for heavy in (result.folder / checkpoint.FOLDER, result.artifact / "merged"):
            shutil.rmtree(heavy, ignore_errors=True)

    def _recipe(
        self,
        operation: Operation,
        methods: Methods | None,
        models: Sequence[ModelRef | None],
        data: DataRef | None,
        task: str | None,
        name: str,
        settings: Mapping[str, Any],
    ) -> Recipe:
        refs = (
            self.inner.methods
            if methods is None
            else tuple(MethodRef(slug=slug, params=dict(params)) for slug, params in methods)
        )
        first, *more = [model or self.recipe.model for model in models]
        merged = {**self.recipe.settings.model_dump(), **settings}
        return Recipe(
            name=name,
            operation=operation,
            task=task or self.recipe.task,
            model=first,
            models=tuple(more),
            data=data or self.recipe.data,
            methods=refs,
            settings=TrainSettings.model_validate(merged),
        )


class _Left(Exception):
    """A step was left before its end, by request."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason)
        self.ending = ending


def run(checked: Checked, folder: Path, log: EventLog, control: Control, *, nested: bool = False) -> Ending:
    """Play the plan of the flow's method to its end, or to where a person left it."""
    facts, lead, began = checked.facts, checked.composition.chosen[0], time.monotonic()
    assert facts is not None
    (folder / STEPS).mkdir(exist_ok=True)
    ctx = FlowContext(checked.recipe, facts, lead, folder, log, control)
    log.emit("state", {"state": "running", "message": f"{lead.method.card.title} begins."})
    player = _Player(ctx, log, control, int(checked.estimate.get("total_steps", 0)))
    plan = lead.method(lead.params).plan(ctx)
    answer: Any = None
    try:
        while True:
            asked = plan.send(answer)
            answer = player.play(asked) if isinstance(asked, Step) else [player.play(step) for step in asked]
    except StopIteration as end:
        outcome: Outcome = end.value
    except _Left as left:
        return left.ending
    log.emit("state", {"state": "exporting", "message": "Writing the result and checking it in a clean process."})
    return take_home(
        checked,
        lead,
        folder,
        log,
        taken=outcome.take,
        report=outcome.report,
        message=outcome.message,
        notes=ctx.notes,
        began=began,
    )


class _Player:
    """Plays steps one after the other, each in a folder of its own."""

    def __init__(self, ctx: FlowContext, log: EventLog, control: Control, total: int) -> None:
        self.ctx, self.log, self.control, self.total = ctx, log, control, total
        self.count = 0
        self.offset = {"step": 0, "samples": 0, "tokens": 0}

    def play(self, step: Step) -> StepResult:
        self.count += 1
        folder = self.ctx.folder / STEPS / f"{self.count:02d}-{step.name}"
        folder.mkdir(exist_ok=True)
        result = self._earlier(step, folder) or self._now(step, folder)
        row = last_row(folder)
        for key in self.offset:
            self.offset[key] += int(row.get(key, 0))
        return result

    def _earlier(self, step: Step, folder: Path) -> StepResult | None:
        try:
            done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if done["fingerprint"] != step.recipe.fingerprint():
            return None
        if done["outcome"] == "failed":
            return StepResult(name=step.name, folder=folder, outcome="failed", message=done["message"])
        return result_of(step.name, folder, Ending(**done["ending"]))

    def _now(self, step: Step, folder: Path) -> StepResult:
        self.log.emit(
            "log", {"level": "info", "message": f"Step {self.count}: {step.title}."}, step=self.offset["step"]
        )
        log = NestedLog(folder, self.log, step.name, self.offset, self.total)
        done: dict[str, Any] = {"fingerprint": step.recipe.fingerprint()}
        try:
            checked = require(step.recipe)
            write_json(folder / "recipe.json", checked.recipe.model_dump(mode="json"))
            ending = driver(step.recipe.operation)(checked, folder, log, self.control, nested=True)
        except EngineError as error:
            if not step.may_fail:
                raise
            write_json(folder / DONE, {**done, "outcome": "failed", "message": str(error)})
            return StepResult(name=step.name, folder=folder, outcome="failed", message=str(error))
        finally:
            log.close()
        if not ending.exports:
            raise _Left(ending)
        write_json(folder / DONE, {**done, "outcome": "succeeded", "ending": asdict(ending)})
        return result_of(step.name, folder, ending)
