"""Check: refuse early, in sentences, all faults at once, without loading a weight; or say what a run would be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from engine.core.compose import compose, fit_faults, resolve
from engine.core.compose_work import count_faults, inner_recipe, lead_faults, lead_of, missing_data
from engine.core.errors import EngineError, Fault, RecipeError
from engine.core.facts import NO_DATA, DataFacts, Facts, ModelFacts
from engine.core.method import Chosen, Composition, Suggestion
from engine.core.recipe import Recipe
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.io.datasets import dataset_faults
from engine.io.facts import data_facts, machine_facts, model_facts
from engine.ops.compiling import choose_compile, compile_faults
from engine.ops.estimate import choose_memory, estimate
from engine.tasks import task as task_named
from engine.tasks.base import Task


@dataclass(kw_only=True)
class Checked:
    """The answer of `check`."""

    recipe: Recipe
    composition: Composition
    faults: list[Fault] = field(default_factory=list)
    facts: Facts | None = None
    suggestions: list[Suggestion] = field(default_factory=list)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "fingerprint": self.recipe.fingerprint(),
            "faults": [fault.to_dict() for fault in self.faults],
            "suggestions": [{"where": s.where, "value": s.value, "reason": s.reason} for s in self.suggestions],
            "composition": [
                {"slot": slot.value, "slug": item.slug, "default": item.index is None}
                for slot in Slot
                for item in self.composition.in_slot(slot)
            ],
            "verdicts": self.verdicts,
            "estimate": self.estimate,
        }


def check(recipe: Recipe) -> Checked:
    """Everything that can be known before weights are loaded."""
    return check_training(recipe) if recipe.operation == "train" else check_work(recipe)


def check_training(recipe: Recipe) -> Checked:
    """`check` for the operation *train*."""
    composition, faults = compose(recipe)
    checked = Checked(recipe=recipe, composition=composition, faults=faults)
    try:
        task = task_named(recipe.task)
    except EngineError as error:
        faults.append(error.fault)
        return checked
    model = data = None
    try:
        model = model_facts(recipe.model.source, task=recipe.task)
        faults += _kind_faults(model, task, "model.source")
    except EngineError as error:
        faults += _at("model.source", error)
    if recipe.data is None:
        faults.append(missing_data("Training"))
        return checked
    try:
        data = data_facts(recipe.data)
        faults += dataset_faults(data, recipe.task, task.data_shapes, task.roles, recipe.settings.holdout)
    except EngineError as error:
        faults += _at("data", error)
    if model is None or data is None:
        return checked
    checked.facts = facts = Facts(task=recipe.task, model=model, data=data, machine=machine_facts())
    faults += fit_faults(composition, facts)
    checked.verdicts = _verdicts(facts)
    if not faults:
        checked.recipe, checked.suggestions = resolve(recipe, composition, facts)
        checked.composition, faults_after = compose(checked.recipe)
        faults += faults_after + fit_faults(checked.composition, facts)
        checked.recipe, advice = choose_memory(checked.recipe, checked.composition, facts)
        checked.suggestions += advice
        checked.recipe, advice = choose_compile(checked.recipe, checked.composition, facts)
        checked.suggestions += advice
        faults += _offload_faults(checked.recipe, facts) + compile_faults(checked.recipe, checked.composition, facts)
        checked.estimate = estimate(checked.recipe, checked.composition, facts)
        faults += _memory_faults(checked.estimate, facts)
    return checked


def check_work(recipe: Recipe) -> Checked:
    """`check` for every operation that is led by one method."""
    lead, faults = lead_of(recipe)
    checked = Checked(recipe=recipe, composition=Composition(() if lead is None else (lead,)), faults=faults)
    try:
        task = task_named(recipe.task)
    except EngineError as error:
        faults.append(error.fault)
        return checked
    models: list[ModelFacts] = []
    for place, ref in enumerate((recipe.model, *recipe.models)):
        where = f"models[{place - 1}].source" if place else "model.source"
        try:
            models.append(model_facts(ref.source, task=recipe.task))
            faults += _kind_faults(models[-1], task, where)
        except EngineError as error:
            faults += _at(where, error)
    data: DataFacts | None = NO_DATA
    if recipe.data is not None:
        try:
            data = data_facts(recipe.data)
            faults += dataset_faults(data, recipe.task, task.data_shapes, task.roles, recipe.settings.holdout)
        except EngineError as error:
            data, faults[len(faults) :] = None, _at("data", error)
    if lead is None:
        return checked
    faults += count_faults(lead, recipe)
    if len(models) != 1 + len(recipe.models) or data is None:
        return checked
    facts = Facts(task=recipe.task, model=models[0], data=data, machine=machine_facts(), models=tuple(models[1:]))
    checked.facts = facts
    faults += lead_faults(lead, facts)
    checked.verdicts = _verdicts(facts)
    if faults:
        return checked
    inner, has_inner = inner_recipe(recipe, lead), len(recipe.methods) > 1 or lead.method.training == "required"
    guess: dict[str, Any] = {}
    if has_inner:
        inside = check_training(inner)
        faults += [Fault(**{**f.to_dict(), "where": _outside(f.where, lead)}) for f in inside.faults]
        checked.suggestions = [replace(advice, where=_outside(advice.where, lead)) for advice in inside.suggestions]
        guess = inside.estimate
        checked.composition = Composition((lead, *inside.composition.chosen), inside.composition.by_slot)
        inner = inside.recipe
        if not inside.faults:
            found = lead.method.check_inner(lead.params, inner)
            faults += [Fault(**{**f.to_dict(), "where": f"{lead.where}.params.{f.where}"}) for f in found]
    elif recipe.data is not None:
        filled, checked.suggestions = resolve(recipe, checked.composition, facts)
        guess, inner = estimate(filled, checked.composition, facts), filled
    if faults:
        return checked
    methods = list(inner.methods)
    if has_inner:
        methods.insert(lead.index or 0, recipe.methods[lead.index or 0])
    checked.recipe = recipe.model_copy(update={"methods": tuple(methods or recipe.methods), "settings": inner.settings})
    checked.estimate = _work_estimate(guess, lead, facts)
    if lead.method.num_runs(lead.params, facts):
        faults += _memory_faults(checked.estimate, facts)
    return checked


def _outside(where: str, lead: Chosen) -> str:
    """A place in the inner recipe, as a place in the whole one."""
    head, closing, rest = where.partition("]")
    if not (head.startswith("methods[") and closing):
        return where
    place = int(head.removeprefix("methods["))
    return f"methods[{place + (place >= (lead.index or 0))}]{rest}"


def _work_estimate(guess: dict[str, Any], lead: Chosen, facts: Facts) -> dict[str, Any]:
    """Trainings of the inner recipe, and reading and writing every weight once a model."""
    runs = lead.method.num_runs(lead.params, facts)
    weights = sum(model.num_parameters for model in (facts.model, *facts.models)) * 4
    own = 2.0 + weights / 2e8
    seconds = runs * float(guess.get("seconds", 0.0)) + own
    memory = int(guess["memory_bytes"]) if runs else 400_000_000 + min(weights, 4 * facts.model.num_parameters)
    return {
        "memory_bytes": memory,
        "seconds": round(seconds, 1),
        "seconds_low": round(seconds * 0.5, 1),
        "seconds_high": round(seconds * 2.5, 1),
        "num_trainable": int(guess.get("num_trainable", 0)) if runs else 0,
        "total_steps": int(guess.get("total_steps", 0) * runs),
        "device": facts.machine.device,
        "device_name": facts.machine.device_name,
    }


def require(recipe: Recipe) -> Checked:
    """`check`, raising RecipeError when anything is wrong."""
    checked = check(recipe)
    if checked.faults or checked.facts is None:
        raise RecipeError(checked.faults)
    return checked


def _verdicts(facts: Facts) -> dict[str, dict[str, Any]]:
    """What every method of the catalogue says to these facts."""
    said = {slug: method.supports(facts) for slug, method in catalogue().items()}
    return {slug: {"ok": v.ok, "why": v.why, "way_out": v.way_out} for slug, v in said.items()}


def _kind_faults(model: ModelFacts, task: Task, where: str) -> list[Fault]:
    if model.kind in task.model_kinds:
        return []
    return [
        Fault(
            where=where,
            what=f"This model is {model.a_kind}.",
            code="wrong_model_kind",
            why=f"The goal '{task.title}' needs a model of the kind {' or '.join(task.model_kinds)}.",
            way_out="Choose another model, or another goal.",
        )
    ]


def _offload_faults(recipe: Recipe, facts: Facts) -> list[Fault]:
    settings = recipe.settings
    if settings.activation_offload != "on":
        return []
    where = "settings.activation_offload"
    if facts.machine.device != "cuda":
        return [
            Fault(
                where=where,
                code="no_other_memory",
                what="Activations cannot be parked in main memory here.",
                why=f"{facts.machine.device_name} computes in main memory already.",
                way_out="Leave it to the studio (auto), or switch it off.",
            )
        ]
    if settings.gradient_checkpointing != "on":
        return [
            Fault(
                where=where,
                code="needs_recomputing",
                what="Activations can be parked in main memory only where they are recomputed.",
                why="Then one state a block is parked, not everything that the block computed.",
                way_out="Switch 'Recompute instead of remember' on, or leave both to the studio (auto).",
            )
        ]
    return []


def _memory_faults(guess: dict[str, Any], facts: Facts) -> list[Fault]:
    need, have = guess["memory_bytes"], facts.machine.memory_bytes
    if need <= have:
        return []
    return [
        Fault(
            where="settings.batch_size",
            code="out_of_memory",
            what=f"This run needs about {need / 1e9:.1f} GB of memory.",
            why=f"{facts.machine.device_name} has {have / 1e9:.1f} GB.",
            way_out="Choose fewer examples at a time (and add up more batches), a shorter longest text, recomputing activations, "
            "a lighter method, or a smaller model.",
        )
    ]


def _at(where: str, error: EngineError) -> list[Fault]:
    faults = error.faults if isinstance(error, RecipeError) else (error.fault,)
    return [
        Fault(**{**fault.to_dict(), "where": where if fault.where in {"", "file"} else fault.where}) for fault in faults
    ]
