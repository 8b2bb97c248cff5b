"""Saved states of a run, runs that go on from them, and the tree that grows so."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db.models import QuerySet

from engine.core.errors import Fault, RecipeError, bad_input
from engine.core.fork import COMPUTING, PLAN, checkpoint_steps, differing, fork_faults, lay_fork
from engine.core.recipe import Recipe, changed
from jobs.access import Person, jobs_for, may_change
from jobs.actions import ActionRefused, Create
from jobs.catalogue import catalogue
from jobs.models import Event, Job
from jobs.places import job_folder

MOST_OF_A_FAMILY = 200


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A checkpoint from which another run can go on, and how the run stood there."""

    step: int
    best: bool
    metrics: dict[str, Any]  # of the newest evaluation up to there


def saved_states(job: Job) -> list[SavedState]:
    """The states that a training run has on the disk now, the newest first."""
    if job.recipe.get("operation", "train") != "train":
        return []
    steps = checkpoint_steps(job_folder(job.pk))
    if not steps:
        return []
    measured = [
        (event.step, event.data) for event in Event.objects.filter(job=job, kind="evaluation").order_by("step", "seq")
    ]
    best = max((step for step, data in measured if data.get("best")), default=None)
    return [
        SavedState(
            step=step,
            best=step == best,
            metrics=next((data for at, data in reversed(measured) if at <= step), {}),
        )
        for step in reversed(steps)
    ]


def knobs(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a fork may change, by dotted name, each with its schema: how far to go, and what may change between two steps."""
    known = catalogue()
    found = {
        f"settings.{name}": spec
        for name, spec in known["settings"]["properties"].items()
        if name in (*PLAN, *COMPUTING) or spec.get("live")
    }
    cards = {card["slug"]: card for card in known["methods"]}
    for ref in recipe.get("methods", []):
        properties = cards.get(ref["slug"], {}).get("schema", {}).get("properties", {})
        found |= {f"{ref['slug']}.{name}": spec for name, spec in properties.items() if spec.get("live")}
    return found


def is_plan(name: str) -> bool:
    """Whether a dotted name says how far to go, how to measure and how to compute, not how to learn."""
    return name.removeprefix("settings.") in (*PLAN, *COMPUTING)


def value_of(recipe: Mapping[str, Any], name: str) -> Any:
    """What stands in a recipe under a dotted name; None where nothing is said."""
    head, _, leaf = name.partition(".")
    if head == "settings":
        return recipe.get("settings", {}).get(leaf)
    return next((ref["params"].get(leaf) for ref in recipe.get("methods", []) if ref["slug"] == head), None)


def with_changes(job: Job, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a run with every setting as it ran, and some of them changed; raises RecipeError for names that it does not hold."""
    faults = [_unknown(name) for name in changes if not _is_held(job.recipe, name)]
    if faults:
        raise RecipeError(faults)
    settings = dict(job.recipe.get("settings", {}))
    methods = [{**ref, "params": dict(ref.get("params", {}))} for ref in job.recipe.get("methods", [])]
    for name, value in changes.items():
        head, _, leaf = name.partition(".")
        for params in [settings] if head == "settings" else [ref["params"] for ref in methods if ref["slug"] == head]:
            params[leaf] = value
    return {**job.request, "settings": settings, "methods": methods}


def remedied(job: Job, changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a signal proposes: the recipe of a new run from the beginning, and what differs by dotted name, as a fork takes it."""
    before = Recipe.model_validate(job.recipe)
    after = changed(before, changes)
    body = after.model_dump(mode="json")
    anew = {**job.request, "settings": body["settings"], "methods": body["methods"]}
    return anew, {name: value for name, (_, value) in differing(before, after).items()}


def _is_held(recipe: Mapping[str, Any], name: str) -> bool:
    head, dot, leaf = name.partition(".")
    return bool(dot and leaf) and (head == "settings" or any(ref["slug"] == head for ref in recipe.get("methods", [])))


def _unknown(name: str) -> Fault:
    return Fault(
        where=f"changes.{name[:100]}",
        what=f"The run has no setting called '{name[:100]}'.",
        why="A setting is named settings.learning_rate, a dial of a method of the run adamw.weight_decay.",
        way_out="Use one of the names that the list of saved states gives as knobs.",
        code="unknown_setting",
    )


@dataclass(kw_only=True)
class Fork:
    """Start a new run that goes on from a saved state of `job`, with some settings changed.

    step: of the state; None means the newest one.  changes: by dotted name, as `knobs` lists them.
    """

    job: Job
    step: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    idempotency_key: str = ""

    def check(self, user: Person) -> str | None:
        """Why `user` cannot do this now, or None."""
        if not may_change(user, self.job.owner_id):
            return "This job belongs to somebody else."
        if self.job.recipe.get("operation", "train") != "train":
            return "Only a training run has saved states from which another run can go on."
        if not checkpoint_steps(job_folder(self.job.pk)):
            return "This run has saved no state yet."
        return None

    def execute(self, user: Person) -> Job:
        """Queue the new run; raises ActionRefused, or RecipeError with everything that cannot change in the middle of a run."""
        sentence = self.check(user)
        if sentence:
            raise ActionRefused(sentence, "not_possible" if may_change(user, self.job.owner_id) else "forbidden")
        steps = checkpoint_steps(job_folder(self.job.pk))
        step = steps[-1] if self.step is None else self.step
        if step not in steps:
            raise _no_state(step, steps)
        create = Create(
            owner=user,
            recipe=with_changes(self.job, self.changes),
            name=self.name or self.job.name,
            again_of=self.job,
            fork_step=step,
            idempotency_key=self.idempotency_key,
            lay=self._lay,
        )
        return create.execute(user)

    def _lay(self, made: Job) -> None:
        before, after = Recipe.model_validate(self.job.recipe), Recipe.model_validate(made.recipe)
        faults = fork_faults(before, after, knobs(self.job.recipe).__contains__)
        if faults:
            raise RecipeError(faults)
        assert made.fork_step is not None
        folder = job_folder(made.pk)
        try:
            lay_fork(job_folder(self.job.pk), made.fork_step, folder, name=self.job.name, recipe=self.job.recipe)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _no_state(step: int, steps: Sequence[int]) -> Exception:
    return bad_input(
        "step",
        f"There is no saved state at step {step:,}.",
        "A run keeps its newest states and its best one; the others make room for them.",
        f"Choose one of the steps {', '.join(f'{number:,}' for number in steps)}.",
        "no_checkpoint",
    )


@dataclass(kw_only=True)
class Branch:
    """A run in its family: where it left its parent, what it changed, and who came from it."""

    job: Job
    changes: list[tuple[str, Any, Any]] = field(default_factory=list)  # (dotted name, before, after)
    children: list[Branch] = field(default_factory=list)


def family(job: Job, user: Person) -> Branch | None:
    """The tree of runs that `job` belongs to, as far as `user` may see it; None when it stands alone."""
    seen = jobs_for(user).select_related("artifact")
    root = _eldest(job, seen)
    branches = {root.pk: Branch(job=root)}
    generation = [root.pk]
    while generation and len(branches) < MOST_OF_A_FAMILY:
        children = seen.filter(again_of_id__in=generation).order_by("created")[: MOST_OF_A_FAMILY - len(branches)]
        generation = []
        for child in children:
            if child.pk not in branches and child.again_of_id is not None:
                parent = branches[child.again_of_id]
                branches[child.pk] = Branch(job=child, changes=differences(parent.job, child))
                parent.children.append(branches[child.pk])
                generation.append(child.pk)
    return branches[root.pk] if len(branches) > 1 else None


def _eldest(job: Job, seen: QuerySet[Job]) -> Job:
    met = {job.pk}
    while job.again_of_id is not None and job.again_of_id not in met:
        parent = seen.filter(pk=job.again_of_id).first()
        if parent is None:
            break
        met.add(parent.pk)
        job = parent
    return job


def differences(one: Job, other: Job) -> list[tuple[str, Any, Any]]:
    """What differs between the recipes of two runs: (dotted name, in the one, in the other)."""
    try:
        before, after = Recipe.model_validate(one.recipe), Recipe.model_validate(other.recipe)
    except ValueError:  # of an older studio
        return []
    return [(name, *pair) for name, pair in differing(before, after).items()]
