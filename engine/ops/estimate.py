"""What a run would need: memory, steps and time, from the shapes alone.

What is remembered for going backward is counted block by block, in numbers for each place of a micro-batch, for the modelling code of transformers 5:

    a norm          its input; where its gain learns, also its normed input
    attention       query, key, value and answer, with keys and values repeated for every head
    feed-forward    a gated one: gate, activated gate and up; a plain one: what goes into the activation
    learned matrix  its input, once for all matrices that read the same one (`input_share` of it where the method remembers less)
    dropout         the noise of two layers, and on a CPU three tables of attention probabilities

Blocks below everything that learns remember nothing. A test compares the sum with what autograd really keeps; it is within a factor of 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from engine.core.facts import Facts, ModelFacts
from engine.core.method import Chosen, Composition, Suggestion, Written
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.blocks import Block, Module, find_blocks
from engine.parts.losses import CHUNK_BYTES
from engine.tasks import task as task_named
from engine.tasks.language import heads_directly

BASE = 400_000_000  # of the interpreter with torch and transformers
ROOM = 0.9  # of the memory, before activations are forgotten to save some
_CHARS_PER_TOKEN = 3.5
_SAME_INPUT = ({"q", "k", "v", "qkv", "kv"}, {"gate", "up", "gate_up"}, {"o"}, {"down"})


@dataclass(frozen=True, kw_only=True)
class Places:
    """The largest micro-batch: how many places it has, and how many of them a text has at most."""

    total: int
    longest: int


def estimate(recipe: Recipe, composition: Composition, facts: Facts) -> dict[str, Any]:
    """Memory, steps and time; times are a span because machines differ.

    Floating-point work per token is 2N forward, 2N for the gradient of activations and 2T for the gradient of what learns. The second part shrinks to the
    share that the most demanding parametrization needs.
    """
    settings, model, data = recipe.settings, facts.model, facts.data
    learners = composition.in_slot(Slot.PARAMETRIZATION)
    trainable = sum(c.method.num_trainable(c.params, facts) for c in learners)
    backward = max((_share(c, facts) for c in learners), default=1.0)
    examples = max(1, int(data.num_rows * (1 - settings.holdout)))
    batch = (settings.batch_size or 1) * settings.accumulate
    steps = ceil((settings.epochs or 1) * ceil(examples / batch))
    steps = min(steps, settings.max_steps or steps)
    tokens = steps * batch * min(settings.max_length or 128, max(8, data.mean_chars / _CHARS_PER_TOKEN + 4))
    dense = sum(out * into for out, into in model.linears.values()) or model.num_parameters
    flops = tokens * (2 * dense + 2 * backward * dense + 2 * min(trainable, dense))
    half = settings.precision == "bf16"
    speed = (4e13 if facts.machine.device == "cuda" else 2.2e10 * facts.machine.num_threads) * (1.5 if half else 1.0)
    seconds = flops / speed + (12 if facts.machine.device == "cpu" else 20)
    memory = weight_bytes(recipe, composition, facts) + saved_bytes(recipe, composition, facts) + BASE
    return {
        "memory_bytes": int(memory),
        "seconds": round(seconds, 1),
        "seconds_low": round(seconds * 0.5, 1),
        "seconds_high": round(seconds * 2.5, 1),
        "num_trainable": int(trainable),
        "total_steps": steps,
        "device": facts.machine.device,
        "device_name": facts.machine.device_name,
    }


def choose_memory(recipe: Recipe, composition: Composition, facts: Facts) -> tuple[Recipe, list[Suggestion]]:
    """Settle whether activations are computed again or parked in main memory, where the recipe leaves it open: only when the run would not fit otherwise."""
    settings, machine = recipe.settings, facts.machine
    open_to = settings.gradient_checkpointing, settings.activation_offload
    tries = [
        (again, parked)
        for again, parked in (("off", "off"), ("on", "off"), ("on", "on"))
        if open_to[0] in {"auto", again} and open_to[1] in {"auto", parked}
    ]
    if machine.device != "cuda" and open_to[1] == "auto":
        tries = [pair for pair in tries if pair[1] == "off"]
    needs: list[int] = []
    for again, parked in tries:
        changed = {"gradient_checkpointing": again, "activation_offload": parked}
        tried = recipe.model_copy(update={"settings": settings.model_copy(update=changed)})
        needs.append(int(estimate(tried, composition, facts)["memory_bytes"]))
        if needs[-1] <= ROOM * machine.memory_bytes:
            break
    if not tries:
        return recipe, []
    if needs[-1] >= needs[0]:  # forgetting saves nothing here
        needs = needs[:1]
    chosen = tries[len(needs) - 1]
    settled = {"gradient_checkpointing": chosen[0], "activation_offload": chosen[1]}
    filled = recipe.model_copy(update={"settings": settings.model_copy(update=settled)})
    have = f"and {machine.device_name} has {machine.memory_bytes / 1e9:.1f} GB"
    advice = []
    if open_to[0] == "auto" and chosen[0] == "on" and len(needs) > 1:
        reason = f"Remembering all activations would take about {needs[0] / 1e9:.1f} GB, {have}. Recomputing them takes about a fifth longer."
        advice.append(Suggestion(where="settings.gradient_checkpointing", value="on", reason=reason))
    if open_to[1] == "auto" and chosen[1] == "on":
        reason = f"Recomputing alone would take about {needs[-2] / 1e9:.1f} GB, {have}. Parked in main memory, activations leave more room and slow each step down."
        advice.append(Suggestion(where="settings.activation_offload", value="on", reason=reason))
    return filled, advice


def weight_bytes(recipe: Recipe, composition: Composition, facts: Facts) -> float:
    """Weights, and for what learns its fp32 value, gradient and two moments; a second model where answers are compared with it; keys and values of answers
    that are written at once."""
    model, width = facts.model, 2 if recipe.settings.precision == "bf16" else 4
    trainable = sum(c.method.num_trainable(c.params, facts) for c in composition.in_slot(Slot.PARAMETRIZATION))
    total = float(model.num_parameters * width + trainable * 16)
    written = _written(composition)
    if written is not None:
        attention = [block.attention for block in find_blocks(model.tensors).blocks]
        wide = sum(_out(block[role], model) for block in attention for role in ("k", "v") if role in block)
        at_once = min(
            written.at_once, (recipe.settings.batch_size or 1) * recipe.settings.accumulate * written.attempts
        )
        total += at_once * (written.tokens + _longest(recipe, facts)) * wide * width
        total += model.num_parameters * 4 if written.reference else 0
    return total


def saved_bytes(recipe: Recipe, composition: Composition, facts: Facts) -> float:
    """What autograd keeps for the backward pass of the largest micro-batch, on the device that computes."""
    settings, model = recipe.settings, facts.model
    places = largest_batch(recipe, composition, facts)
    width = 2 if settings.precision == "bf16" else 4
    learners = composition.in_slot(Slot.PARAMETRIZATION)
    blocks = find_blocks(model.tensors).blocks
    lowest = min((_lowest(blocks, c, facts) for c in learners), default=0)
    kept = [_numbers(block, learners, places, facts) for block in blocks[lowest:]]
    kept = kept or [20.0 * model.hidden_size] * (0 if blocks else model.num_layers)  # a model whose names say nothing
    share = max((c.method.backward_share(c.params, facts) for c in learners), default=1.0)
    inside = sum(kept) * share
    if settings.gradient_checkpointing == "on":
        waiting = len(kept) * model.hidden_size if settings.activation_offload != "on" else 0.0
        inside = max(kept, default=0.0) * share + waiting
    logits = 4.0 * places.total * model.vocab_size if model.kind != "encoder" else 0.0
    head = min(logits, float(CHUNK_BYTES)) if heads_directly(model.architecture) else 2 * logits
    outside = 3.0 * model.hidden_size  # the last norm and what the head reads
    return places.total * (inside + outside) * width + head


def largest_batch(recipe: Recipe, composition: Composition, facts: Facts) -> Places:
    """Texts of a micro-batch are padded to the longest, or packed without padding where the task packs."""
    settings, task = recipe.settings, task_named(recipe.task)
    rows, longest = (settings.batch_size or 1) * task.rows_per_example, _longest(recipe, facts)
    written = _written(composition)
    if written is not None:
        whole = longest + written.tokens
        return Places(total=(written.rows or rows) * whole, longest=whole)
    if settings.packing and task.packs_examples and not task.fills_rows:
        mean = min(longest, facts.data.mean_chars / _CHARS_PER_TOKEN + 4)
        return Places(total=ceil(max(longest, min(rows * longest, 1.25 * rows * mean))), longest=longest)
    return Places(total=rows * longest, longest=longest)


def _longest(recipe: Recipe, facts: Facts) -> int:
    """Tokens of the longest text that a batch is likely to hold."""
    limit, data = recipe.settings.max_length or 128, facts.data
    if task_named(recipe.task).fills_rows and recipe.settings.packing:
        return int(min(limit, max(8.0, data.num_rows * data.mean_chars / _CHARS_PER_TOKEN)))
    return int(min(limit, max(8.0, data.p99_chars / _CHARS_PER_TOKEN + 8)))


def _written(composition: Composition) -> Written | None:
    return next(
        (found for c in composition.in_slot(Slot.DATA_POLICY) if (found := c.method.written(c.params)) is not None),
        None,
    )


def _lowest(blocks: Sequence[Block], learner: Chosen, facts: Facts) -> int:
    """The lowest block in which something learns; 0 where something below the blocks does."""
    claims = learner.method.claims(learner.params, facts)
    inside = {
        name: place for place, block in enumerate(blocks) for module in block.modules() for name in module.tensors
    }
    first = min(inside, key=lambda name: list(facts.model.tensors).index(name), default=None)
    for name in facts.model.tensors:
        if name == first:
            break
        if name in claims:
            return 0
    return min((inside[name] for name in claims if name in inside), default=len(blocks))


def _share(learner: Chosen, facts: Facts) -> float:
    """The share of the model that backward runs through."""
    blocks = find_blocks(facts.model.tensors).blocks
    above = 1 - _lowest(blocks, learner, facts) / len(blocks) if blocks else 1.0
    return min(above, learner.method.backward_share(learner.params, facts))


def _numbers(block: Block, learners: Sequence[Chosen], places: Places, facts: Facts) -> float:
    """How many numbers a block remembers for each place."""
    model = facts.model
    hidden = model.hidden_size
    query = next((_out(block.attention[role], model) for role in ("q", "o") if role in block.attention), hidden)
    ways = {module.role: _out(module, model) for module in block.feed_forward}
    inner = max((size for role, size in ways.items() if role != "down"), default=4 * hidden)
    gated = "gate" in ways or "gate_up" in ways
    total = 4.0 * query + (3.0 * inner if gated else inner) + len(block.norms) * hidden
    if model.dropout:
        on_cpu = facts.machine.device == "cpu"
        total += 2.0 * hidden * (1 if on_cpu else 0.25) + (3.0 * model.num_heads * places.longest if on_cpu else 0.0)
    for learner in learners:
        claims = learner.method.claims(learner.params, facts)
        total += learner.method.input_share(learner.params, facts) * _inputs(block, claims, model)
        total += sum(hidden for module in block.norms if claims.intersection(module.tensors))
    return total


def _inputs(block: Block, claims: frozenset[str], model: ModelFacts) -> float:
    """Numbers that the claimed matrices of a block read, an input that several of them share once. What `o` reads is attention's answer, which is kept anyway
    unless dropout made another one."""
    modules = [*block.attention.values(), *block.feed_forward]
    total = 0.0
    for roles in _SAME_INPUT:
        sizes = [_into(module, model) for module in modules if module.role in roles and module.tensors[0] in claims]
        total += max(sizes, default=0) if roles != {"o"} or model.dropout else 0
    return total


def _out(module: Module, model: ModelFacts) -> int:
    shape = _shape(module, model)
    return shape[0]


def _into(module: Module, model: ModelFacts) -> int:
    return prod(_shape(module, model)[1:])


def _shape(module: Module, model: ModelFacts) -> tuple[int, ...]:
    """[out, in]; families that keep weights as [in, out] have no linear layers in the facts."""
    shape = model.tensors[module.tensors[0]]
    return shape if module.name in model.linears else shape[::-1]
