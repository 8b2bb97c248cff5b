"""Whether compiling the blocks of a model pays: what it wins over the planned run, against what the compiling costs."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Composition, Suggestion
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.ops.estimate import estimate
from engine.parts.blocks import find_blocks

WHERE = "settings.compile"


@dataclass(frozen=True, kw_only=True)
class Pay:
    """What compiled blocks are known to give on a kind of device, and where that is from."""

    faster: float  # steps in the time of one plain step
    seconds: float  # of compiling, once an attempt
    source: str


# The only place of these numbers.
PAYS = {
    # One pair of `manage.py bench compile` on two busy cores: Llama 13 M, LoRA, fp32, plain / compiled 1.05 (0.69 to 1.53), first step 198 s, again 50 s. An earlier
    # trial at 52 M gave 1.79 against 1.60 s a step and 69 s of compiling. Neither is sure enough to count as a gain.
    "cpu": Pay(faster=1.0, seconds=60, source="one measured pair, 1.05 with an interval from 0.69 to 1.53"),
    # Published, not measured by us: torchtitan says +16 % (Llama 8B, H100), torchtune +27 % (Llama 3B, A100) and 30 to 70 s of compiling. The lower gain and the
    # higher cost stand here.
    "cuda": Pay(faster=1.16, seconds=70, source="the figures that torchtitan and torchtune publish"),
}
AT_LEAST = (
    2.0  # times its cost is what compiling must win before `auto` chooses it: the estimate of a run's time is rough
)


def choose_compile(recipe: Recipe, composition: Composition, facts: Facts) -> tuple[Recipe, list[Suggestion]]:
    """Settle `compile` where the recipe leaves it open, from the recipe and the facts alone, and say why."""
    settings, machine = recipe.settings, facts.machine
    if settings.compile != "auto":
        return recipe, []
    pay = PAYS.get(machine.device, PAYS["cpu"])
    train = float(estimate(recipe, composition, facts)["seconds_low"])
    won = train * (1 - 1 / pay.faster)
    against = _against(composition, facts)
    value = "on" if not against and won >= AT_LEAST * pay.seconds else "off"
    if against:
        reason = f"It is not possible here: {against[0].why}"
    elif pay.faster <= 1:
        reason = (
            f"On {machine.device_name} compiled blocks were not reliably quicker than the plain ones ({pay.source})."
        )
    else:
        reason = (
            f"Compiling takes about {pay.seconds:.0f} s and would win about {won:,.0f} s of this run on {machine.device_name}, by {pay.source}; "
            f"it is done where it wins {AT_LEAST:g} times its cost."
        )
    filled = recipe.model_copy(update={"settings": settings.model_copy(update={"compile": value})})
    return filled, [Suggestion(where=WHERE, value=value, reason=reason)]


def compile_faults(recipe: Recipe, composition: Composition, facts: Facts) -> list[Fault]:
    """What keeps a run from being compiled that asks for it."""
    return _against(composition, facts) if recipe.settings.compile == "on" else []


def _against(composition: Composition, facts: Facts) -> list[Fault]:
    faults = []
    if facts.machine.compiler_lacks:
        faults.append(
            Fault(
                where=WHERE,
                code="no_compiler",
                what="The blocks of this model cannot be compiled on this machine.",
                why=f"It lacks {facts.machine.compiler_lacks}.",
                way_out="Leave 'Compile the blocks' to the studio (auto) or switch it off; or install what is missing and start the studio again.",
            )
        )
    if not find_blocks(facts.model.tensors).blocks:
        faults.append(
            Fault(
                where=WHERE,
                code="no_blocks",
                what="Nothing of this model can be compiled.",
                why=f"No repeated blocks are known in a {facts.model.architecture}.",
                way_out="Leave 'Compile the blocks' to the studio (auto), or switch it off.",
            )
        )
    for item in (item for slot in Slot for item in composition.in_slot(slot)):
        reason = item.method.cannot.get("compile")
        if reason and reason not in {fault.why for fault in faults}:
            faults.append(
                Fault(
                    where=WHERE,
                    code="method_not_compiled",
                    what=f"{item.method.card.title} cannot run compiled.",
                    why=reason,
                    way_out="Leave 'Compile the blocks' to the studio (auto) or switch it off, or choose another method.",
                )
            )
    return faults
