"""Composition of the operations that are led by one method: who leads, and the training recipe inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import Chosen, PredictMethod, WorkMethod, method_ref_fault
from engine.core.recipe import Recipe
from engine.core.registry import catalogue


def lead_of(recipe: Recipe) -> tuple[Chosen | None, list[Fault]]:
    """The one method that leads the operation, its hyperparameters parsed; every fault of its choice at once."""
    known = {slug: m for slug, m in catalogue().items() if m.role == recipe.operation and issubclass(m, WorkMethod)}
    places = [index for index, ref in enumerate(recipe.methods) if ref.slug in known]
    if len(places) != 1:
        unknown = [i for i, ref in enumerate(recipe.methods) if ref.slug not in catalogue()]
        if unknown and not places:
            return None, [method_ref_fault(recipe.methods[unknown[0]], unknown[0], list(known))]
        return None, [
            Fault(
                where="methods",
                what=f"{len(places) or 'No'} method{'s' if len(places) > 1 else ''} of this recipe can lead the operation '{recipe.operation}'.",
                why="Exactly one method says what is done.",
                way_out=f"Name one of: {', '.join(known)}." if known else "Choose another operation.",
                code="slot_taken" if places else "slot_empty",
            )
        ]
    index = places[0]
    method = known[recipe.methods[index].slug]
    params, faults = method.parse(recipe.methods[index].params, f"methods[{index}].params")
    if method.training == "none":
        for other, ref in enumerate(recipe.methods):
            if other != index:
                faults.append(
                    Fault(
                        where=f"methods[{other}].slug",
                        what=f"{method.card.title} takes no training methods, and this recipe names '{ref.slug}'.",
                        why="It would have been ignored silently.",
                        way_out=f"Remove '{ref.slug}', or queue it as a training run of its own.",
                        code="not_here",
                    )
                )
    return (None if params is None else Chosen(method=method, params=params, index=index)), faults


def inner_recipe(recipe: Recipe, lead: Chosen) -> Recipe:
    """The training recipe inside of a flow or a search: everything but the lead."""
    methods = tuple(ref for place, ref in enumerate(recipe.methods) if place != lead.index)
    return recipe.model_copy(update={"operation": "train", "methods": methods, "models": ()})


def count_faults(lead: Chosen, recipe: Recipe) -> list[Fault]:
    """Too few or too many models, missing data."""
    faults = []
    low, high = lead.method.num_models
    given = 1 + len(recipe.models)
    if given < low or (high is not None and given > high):
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        faults.append(
            Fault(
                where="models",
                what=f"{lead.method.card.title} takes {wanted} model{'s' if wanted != '1' else ''} and was given {given}.",
                why="Its page says what each of them is for.",
                way_out="Add models." if given < low else "Remove models.",
                code="wrong_number",
            )
        )
    if lead.method.needs_data and recipe.data is None:
        faults.append(missing_data(lead.method.card.title))
    return faults


def missing_data(title: str) -> Fault:
    """Nothing to learn from or to measure with."""
    return Fault(
        where="data",
        what="'data' is missing.",
        why=f"{title} needs examples.",
        way_out="Choose a dataset.",
        code="missing",
    )


def lead_faults(lead: Chosen, facts: Facts) -> list[Fault]:
    """Needs and hyperparameters of the lead against facts."""
    verdict = lead.method.supports(facts)
    if not verdict.ok:
        what = f"{lead.method.card.title} does not fit here."
        return [
            Fault(where=f"{lead.where}.slug", what=what, why=verdict.why, way_out=verdict.way_out, code="does_not_fit")
        ]
    found = lead.method.check(lead.params, facts)
    return [Fault(**{**f.to_dict(), "where": f"{lead.where}.params.{f.where}"}) for f in found]


def predict_method(ref: Mapping[str, Any]) -> type[PredictMethod]:
    """The method that stands between a result and those who ask it, or a refusal that names those that exist."""
    known = {slug: m for slug, m in catalogue().items() if issubclass(m, PredictMethod)}
    slug = str(ref.get("slug", ""))
    if slug not in known:
        raise bad_input(
            "method.slug",
            f"There is no way of answering called '{slug[:60]}'.",
            "It is neither built in nor offered by an installed package.",
            f"Choose one of: {', '.join(known)}." if known else "Ask the result as it is.",
            "unknown_method",
        )
    return known[slug]
