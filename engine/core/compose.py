"""Composition: from a recipe to methods slot by slot, with every fault at once and no weight loaded."""

from __future__ import annotations

from itertools import combinations

from engine.core.errors import Fault, RecipeError
from engine.core.facts import Facts
from engine.core.method import Chosen, Composition, Suggestion, TrainMethod, arity_faults, method_ref_fault
from engine.core.recipe import MethodRef, Recipe, TrainSettings
from engine.core.registry import catalogue
from engine.core.slots import Arity, Phase, Slot

BF16_PARAMETERS = 10_000_000  # models of this size on are trained in bf16 on a processor that has it


def compose(recipe: Recipe) -> tuple[Composition, list[Fault]]:
    """Parse every method of a recipe, apply the arities, fill empty one-part slots with their default methods, and add to the slots that hold many
    the methods that stand there unless the recipe names them itself, with dials of its own."""
    known = {slug: method for slug, method in catalogue().items() if issubclass(method, TrainMethod)}
    faults: list[Fault] = []
    chosen: list[Chosen] = []
    for index, ref in enumerate(recipe.methods):
        method = known.get(ref.slug)
        if method is None:
            faults.append(method_ref_fault(ref, index, list(known)))
            continue
        params, wrong = method.parse(ref.params, f"methods[{index}].params")
        faults += wrong
        if params is not None:
            chosen.append(Chosen(method=method, params=params, index=index))
    faults += arity_faults(chosen)
    taken = {slot for item in chosen for slot in item.method.slots}
    if Slot.PARAMETRIZATION not in taken and not faults:
        faults.append(_nothing_learns(known))
    for slot in Slot:
        if slot.arity is Arity.ONE and slot not in taken:
            fallback = _default_for(slot, known, recipe.task)
            if fallback is not None:
                chosen.append(Chosen(method=fallback, params=fallback.Params(), index=None))
            else:
                faults.append(
                    Fault(
                        where="methods",
                        what=f"Nothing fills the {slot.words} for the goal {recipe.task}.",
                        why=slot.law,
                        way_out=f"Add a method for the {slot.words}.",
                        code="slot_empty",
                    )
                )
    chosen += _standing(known, {ref.slug for ref in recipe.methods}, recipe.task)
    by_slot = {slot: tuple(item for item in chosen if slot in item.method.slots) for slot in Slot}
    by_slot[Slot.DATA_POLICY] = tuple(
        sorted(by_slot[Slot.DATA_POLICY], key=lambda item: item.method.phase or Phase.LOAD)
    )
    return Composition(tuple(chosen), by_slot), faults


def fit_faults(composition: Composition, facts: Facts) -> list[Fault]:
    """Needs, hyperparameters against facts, and disjoint claims."""
    faults: list[Fault] = []
    claims: list[tuple[Chosen, frozenset[str]]] = []
    for item in composition.chosen:
        verdict = item.method.supports(facts)
        if not verdict.ok:
            faults.append(
                Fault(
                    where=f"{item.where}.slug",
                    what=f"{item.method.card.title} does not fit here.",
                    why=verdict.why,
                    way_out=verdict.way_out,
                    code="does_not_fit",
                )
            )
            continue
        for fault in item.method.check(item.params, facts):
            faults.append(Fault(**{**fault.to_dict(), "where": f"{item.where}.params.{fault.where}"}))
        if Slot.PARAMETRIZATION in item.method.slots:
            claims.append((item, item.method.claims(item.params, facts)))
    for (one, mine), (other, theirs) in combinations(claims, 2):
        both = sorted(mine & theirs)
        if both:
            faults.append(
                Fault(
                    where=f"{other.where}.slug",
                    code="claimed_twice",
                    what=f"{one.method.card.title} and {other.method.card.title} both want to change {both[0]}"
                    + (f" and {len(both) - 1} more weights." if len(both) > 1 else "."),
                    why=Slot.PARAMETRIZATION.law,
                    way_out=f"Remove one of the two, or give {other.method.card.title} other target layers.",
                )
            )
    return faults


def resolve(recipe: Recipe, composition: Composition, facts: Facts) -> tuple[Recipe, list[Suggestion]]:
    """Fill every setting that the recipe leaves open. The first advice wins; what the person typed is never touched."""
    advice: list[Suggestion] = []
    ordered = sorted(composition.chosen, key=lambda item: Slot.PARAMETRIZATION not in item.method.slots)
    for item in ordered:
        advice += item.method.suggest(recipe, item.params, facts)
    advice += _general_advice(recipe, facts)
    taken: dict[str, Suggestion] = {}
    for suggestion in advice:
        taken.setdefault(suggestion.where, suggestion)
    values = {
        where.removeprefix("settings."): item.value for where, item in taken.items() if where.startswith("settings.")
    }
    settings = recipe.settings.model_dump()
    settings.update({key: value for key, value in values.items() if settings.get(key) is None})
    if recipe.settings.precision == "auto":
        settings["precision"] = values.get("precision", "fp32")
    methods = list(recipe.methods)
    for index, ref in enumerate(recipe.methods):
        prefix = f"methods[{index}].params."
        extra = {where.removeprefix(prefix): item.value for where, item in taken.items() if where.startswith(prefix)}
        methods[index] = MethodRef(
            slug=ref.slug, params={**extra, **{k: v for k, v in ref.params.items() if v is not None}}
        )
    filled = recipe.model_copy(update={"settings": TrainSettings.model_validate(settings), "methods": tuple(methods)})
    return filled, list(taken.values())


def refuse(faults: list[Fault]) -> None:
    """Raise all faults at once, if there are any."""
    if faults:
        raise RecipeError(faults)


def _default_for(slot: Slot, known: dict[str, type[TrainMethod]], task: str) -> type[TrainMethod] | None:
    standing = [m for m in known.values() if m.default and slot in m.slots]
    made_for = [m for m in standing if task in m.needs.tasks]  # one that names the task comes before one for every task
    fitting = made_for or [m for m in standing if not m.needs.tasks]
    return fitting[0] if len(fitting) == 1 else None


def _standing(known: dict[str, type[TrainMethod]], named: set[str], task: str) -> list[Chosen]:
    """The default methods of slots that hold many: they stand beside whatever else is there."""
    return [
        Chosen(method=method, params=method.Params(), index=None)
        for slug, method in known.items()
        if method.default
        and slug not in named
        and all(slot.arity is Arity.MANY for slot in method.slots)
        and (not method.needs.tasks or task in method.needs.tasks)
    ]


def _nothing_learns(known: dict[str, type[TrainMethod]]) -> Fault:
    ways = [slug for slug, method in known.items() if Slot.PARAMETRIZATION in method.slots]
    return Fault(
        where="methods",
        what="Nothing would learn.",
        why=Slot.PARAMETRIZATION.law,
        way_out=f"Add one of: {', '.join(ways)}.",
        code="slot_empty",
    )


def _general_advice(recipe: Recipe, facts: Facts) -> list[Suggestion]:
    rows, data = facts.data.num_rows, facts.data
    passes = 3.0 if rows > 5000 else 5.0 if rows > 1000 else 8.0
    tokens = int(data.p99_chars / 3.5) + 8
    longest = 16
    while longest < tokens:
        longest *= 2
    ceiling = min(facts.model.max_positions, 512 if facts.machine.device == "cpu" else 2048)
    length = max(8, min(longest, ceiling))
    batch = 16 if facts.task == "classify" else 8
    if rows < 200:
        batch = max(2, batch // 2)
    per_example = 1 if not recipe.settings.batch_size else recipe.settings.batch_size
    precision, why = _precision(facts)
    return [
        Suggestion(
            where="settings.epochs",
            value=passes,
            reason=f"There are {rows:,} examples; {'large' if rows > 5000 else 'small'} data is read {passes:g} times.",
        ),
        Suggestion(
            where="settings.batch_size",
            value=batch,
            reason=f"{batch} examples at a time are steady enough and fit easily in memory." if per_example else "",
        ),
        Suggestion(
            where="settings.max_length",
            value=length,
            reason=f"99 % of the texts have at most {int(data.p99_chars):,} characters, about {tokens:,} tokens; "
            f"this model reads up to {facts.model.max_positions:,}.",
        ),
        Suggestion(where="settings.learning_rate", value=1e-4, reason="A careful middle value."),
        Suggestion(where="settings.precision", value=precision, reason=why),
    ]


def _precision(facts: Facts) -> tuple[str, str]:
    """The number format and the reason for it."""
    machine = facts.machine
    if not machine.has_bf16:
        return "fp32", "On this machine fp32 is exact and repeatable."
    if machine.device == "cuda":
        return "bf16", "This GPU computes quickly in bf16."
    if facts.model.num_parameters < BF16_PARAMETERS:
        return "fp32", "A model this small is quick anyway, and fp32 is exact."
    return (
        "bf16",
        "This processor computes bf16 in hardware, about one and a half times as fast. The result is written in full precision.",
    )
