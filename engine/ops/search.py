"""The *search* operation: trials of the inner training recipe, trained slice by slice as a search method asks.

Every trial is a job folder of its own (`trials/003/`) whose run pauses at the end of a slice. Overwriting a trial with a donor links the donor's
checkpoints into its folder: weights, optimizer moments, counters, generators and data cursor; then its own settings apply. Finished slices stand in
`slices.jsonl`, with their numbers and the seconds they took; an interrupted search asks the method the same questions again and reads the answers
there, so that whatever it decided by score, by numbers or by the clock it decides again. What a person decided about a trial stands between them, where the
search took it up: behind a slice (engine.core.overrides).
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.core.compose_work import inner_recipe
from engine.core.control import Control, write_json
from engine.core.errors import EngineError
from engine.core.events import EventLog
from engine.core.fork import link
from engine.core.method import Chosen, SearchMethod
from engine.core.overrides import Override, SliceControl, read_overrides
from engine.core.recipe import Recipe, canonical
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.core.space import is_live_name, with_values
from engine.core.work import Ask, Mark, Trial
from engine.ops.check import Checked, require
from engine.ops.nested import NestedLog, result_of, take_home
from engine.ops.remedies import for_search
from engine.ops.slices import TrialTable, numbers_of
from engine.ops.train import announce, plan, prepare
from engine.ops.work import Inputs
from engine.train.checkpoint import FOLDER as CHECKPOINTS
from engine.train.export import build_slots, export
from engine.train.loop import train
from engine.train.run import Ending

TRIALS, RECORD, SLICE = "trials", "slices.jsonl", "slice.json"


@dataclass(kw_only=True)
class SearchContext:
    """What a search method knows before it asks: the resolved training recipe, how many steps a whole trial has, and a generator of its own.

    total_steps: with the recipe as it stands.  steps_of: with other values, by dotted name; a larger batch makes fewer steps of the same examples.
    """

    recipe: Recipe
    total_steps: int
    rng: random.Random
    steps_of: Callable[[Mapping[str, Any]], int]


class _Left(Exception):
    """A slice was left before its end, by request."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason)
        self.ending = ending


def run(checked: Checked, folder: Path, log: EventLog, control: Control, *, nested: bool = False) -> Ending:
    """Ask, train, tell, until the method asks for nothing more; then take the winner home."""
    lead, began = checked.composition.chosen[0], time.monotonic()
    inner = require(inner_recipe(checked.recipe, lead))
    method: SearchMethod = lead.method(lead.params)
    (folder / TRIALS).mkdir(exist_ok=True)
    log.emit("state", {"state": "running", "message": f"{lead.method.card.title} begins."})
    player = _Player(inner.recipe, lead, method, folder, log, control)
    table = TrialTable(method, log)
    method.begin(
        SearchContext(recipe=inner.recipe, total_steps=player.total_steps, rng=player.rng, steps_of=player.steps_of)
    )
    assert checked.facts is not None
    player.planned_steps = round(lead.method.num_runs(lead.params, checked.facts) * player.total_steps)
    trials: dict[int, Trial] = {}
    try:
        while not player.stopped and (asked := method.ask(list(trials.values()))):
            table.standing(trials, player.done_steps)  # what the method has decided since the last slice
            for ask in asked:
                trial = trials.setdefault(ask.trial, Trial(number=ask.trial))
                player.play(ask, trial, trials, table)
                player.listen(trials)
                method.tell(trial)
                table.standing(trials, player.done_steps)
                if player.stopped:  # a person said "stop and keep": the best so far goes home
                    break
            table.standing(trials, player.done_steps)
        winner = method.winner(list(trials.values()))
        taken = player.export(trials[winner])
    except _Left as left:
        return left.ending
    report = method.report(list(trials.values()), winner)
    log.emit("state", {"state": "exporting", "message": "Writing the result and checking it in a clean process."})
    return take_home(
        checked, lead, folder, log, taken=taken, report=report, message=report.sentence, notes=player.notes, began=began
    )


class _Player:
    """Trains slices."""

    def __init__(
        self, recipe: Recipe, lead: Chosen, method: SearchMethod, folder: Path, log: EventLog, control: Control
    ) -> None:
        self.recipe, self.lead, self.method = recipe, lead, method
        self.folder, self.log, self.control = folder, log, control
        self.rng = random.Random(f"{recipe.settings.seed}/{method.card.slug}")
        self.record = folder / RECORD
        self.lines = _recorded(self.record)
        self.place = 0  # in these lines
        self.count = 0  # of slices
        self.taken: set[int] = set()  # numbers of the decisions of people that were taken up
        self.done_steps = 0
        self.planned_steps = 0  # of the whole search, as far as it can be said beforehand
        self.elapsed = 0.0
        self.notes: list[str] = []
        self.stopped = False
        self._plans: dict[str, int] = {}
        self.total_steps = self.steps_of({})

    def steps_of(self, values: Mapping[str, Any]) -> int:
        """How many steps a whole trial with these values has; found out once for each kind of batches, since it takes a look at every example."""
        shaping = {name: value for name, value in values.items() if _shapes_batches(name, self.recipe)}
        key, path = canonical(shaping), self.folder / "plan.json"
        if not self._plans and path.exists():
            self._plans = dict(json.loads(path.read_text(encoding="utf-8")).get("steps", {}))
        if key not in self._plans:
            recipe = with_values(self.recipe, shaping)
            checked = require(recipe)
            assert checked.facts is not None
            inputs = Inputs(recipe, checked.facts)
            policies = build_slots(recipe, checked.facts, inputs.task)[1].policies
            for policy in policies:
                policy.survey(inputs.encoded)
            clock = plan(recipe, inputs.task, inputs.encoded, recipe.settings.seed, policies)
            self._plans[key] = clock.total_steps
            write_json(path, {"steps": self._plans})
        return self._plans[key]

    def play(self, ask: Ask, trial: Trial, trials: dict[int, Trial], table: TrialTable) -> None:
        """Train one slice, or read it from the record; the trial gets its mark."""
        donor = trials.get(ask.donor) if ask.donor is not None else None
        start = donor.step if donor is not None else trial.step
        if donor is not None:
            trial.donors.append((donor.step, donor.number))
            trial.failed = ""
        trial.values = dict(ask.values)
        table.running(trial, start, max(ask.until, self.steps_of(ask.values)), self.done_steps)
        asked = {"number": self.count, **asdict(ask)}
        if self.place < len(self.lines):
            line = self.lines[self.place]
            if canonical(line.get("ask")) != canonical(asked):
                raise RuntimeError("The search asks for something else than before the interruption.")
        else:
            line = {"ask": asked, **self._train(ask, trial, donor, start, asked)}
            self._write(line)
        self.place += 1
        self.count += 1
        self.done_steps += max(0, line["step"] - start)
        score = -math.inf if line["score"] is None else float(line["score"])
        self.stopped = bool(line.get("stopped"))
        self.elapsed = float(line.get("elapsed", 0.0))
        trial.marks.append(
            Mark(
                step=line["step"], score=score, values=dict(ask.values), elapsed=self.elapsed, **line.get("numbers", {})
            )
        )
        trial.failed = line["failed"]

    def listen(self, trials: Mapping[int, Trial]) -> None:
        """Take up what people decided about trials: what the record holds at this place, and at its end whatever is new."""
        while self.place < len(self.lines) and "override" in self.lines[self.place]:
            self._take_up(Override(**self.lines[self.place]["override"]), trials)
        if self.place == len(self.lines) and self.method.overrides:
            for made in read_overrides(self.folder):
                if made.number not in self.taken and made.trial in trials:
                    self._write({"override": asdict(made)})
                    self._take_up(made, trials)

    def _take_up(self, made: Override, trials: Mapping[int, Trial]) -> None:
        self.place += 1
        self.taken.add(made.number)
        trial = trials[made.trial]
        ended = bool(trial.failed) or trial.step >= trial.marks[-1].total_steps
        if not ended:
            trial.override = made
            self.method.heed(trial)
        told = {**asdict(made), "taken": not ended, "message": made.too_late if ended else made.sentence}
        self.log.emit("override", told, step=self.done_steps, key=str(made.number))

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def home(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / TRIALS / f"{number:03d}"

    def _train(self, ask: Ask, trial: Trial, donor: Trial | None, start: int, asked: dict[str, Any]) -> dict[str, Any]:
        home = self.home(trial.number)
        home.mkdir(exist_ok=True)
        marker = home / SLICE
        began, spent = time.monotonic(), 0.0
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["number"] == self.count:
            spent = float(json.loads(marker.read_text(encoding="utf-8")).get("spent", 0.0))
        if not marker.exists() or json.loads(marker.read_text(encoding="utf-8"))["number"] != self.count:
            if donor is not None:
                _overwrite(self.home(donor.number), home)
            write_json(home / "recipe.json", with_values(self.recipe, ask.values).model_dump(mode="json"))
            write_json(marker, asked)
            if ask.reason:
                self.log.emit("log", {"level": "info", "message": ask.reason}, step=self.done_steps)
        checked = require(with_values(self.recipe, ask.values))
        offset = {"step": self.done_steps - start, "samples": 0, "tokens": 0}
        ahead = max(self.planned_steps, self.done_steps + ask.until - start)
        remedy = partial(for_search, trial=checked.recipe, base=self.recipe, lead=self.lead)
        log = NestedLog(home, self.log, f"trial-{trial.number}", offset, ahead, remedy=remedy)
        stoppable = "stop" in self.method.overrides
        control = SliceControl(self.control, trial.number, self.taken) if stoppable else self.control
        try:
            run = prepare(checked, home, log, control, forked=True)
            announce(run)
            run.pause_at = ask.until
            ending = train(run)
            cut = isinstance(control, SliceControl) and control.cut
            if (
                not ending.exports
                and not cut
                and (ending.reason != "paused" or run.clock.step < min(ask.until, run.clock.total_steps))
            ):
                write_json(marker, {**asked, "spent": spent + time.monotonic() - began})
                raise _Left(ending)
            score = run.task.goodness(run.scores)[0]
            stopped = ending.reason == "stopped"
            step = ask.until if ending.exports and not stopped else run.clock.step
            return {
                "step": step,
                "score": score if math.isfinite(score) else None,
                "failed": "",
                "stopped": stopped,
                "elapsed": round(self.elapsed + spent + time.monotonic() - began, 3),
                "numbers": numbers_of(run, home),
            }
        except EngineError as error:
            if error.reason != "diverged":
                raise
            self.log.emit(
                "log", {"level": "warning", "message": f"Trial {trial.number}: {error}"}, step=self.done_steps
            )
            elapsed = round(self.elapsed + spent + time.monotonic() - began, 3)
            return {"step": ask.until, "score": None, "failed": str(error), "elapsed": elapsed, "numbers": {}}
        finally:
            log.close()

    def export(self, trial: Trial) -> Any:
        """The artifact of a trial that has trained to its end."""
        home = self.home(trial.number)
        if not (home / "artifact").exists():
            checked = require(with_values(self.recipe, trial.values))
            log = EventLog(home)
            try:
                run = prepare(checked, home, log, self.control, forked=True)
                ending = Ending(reason="completed", message=f"Trial {trial.number} won the search.")
                export(run, ending, certify=False)
            finally:
                log.close()
        return result_of(f"trial-{trial.number}", home, Ending(reason="completed", message=""))


def _shapes_batches(name: str, recipe: Recipe) -> bool:
    """Whether a value may change how many steps a run has: a setting that is fixed while it runs, or a dial of a data policy."""
    head, _, _ = name.partition(".")
    if head == "settings":
        return not is_live_name(name, recipe)
    method = catalogue().get(head)
    return method is not None and Slot.DATA_POLICY in method.slots


def _overwrite(donor: Path, receiver: Path) -> None:
    """The donor's checkpoints in the receiver's place, as links to the same files: nobody writes into a finished checkpoint."""
    shutil.rmtree(receiver / CHECKPOINTS, ignore_errors=True)
    shutil.copytree(donor / CHECKPOINTS, receiver / CHECKPOINTS, copy_function=link)
    shutil.copyfile(donor / "events.jsonl", receiver / "events.jsonl")  # its steps up to here are the donor's


def _recorded(record: Path) -> list[dict[str, Any]]:
    if not record.exists():
        return []
    raw = record.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        record.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
