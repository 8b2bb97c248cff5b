"""The nine part protocols of the *train* operation, and the moment of every hook.

A method says *what*; its parts do the work. The loop calls each hook at exactly one moment; `MOMENTS` lists them in order, the loop's docstring
refers to it, and a test compares it with the trace of a real run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from engine.core.facts import Facts
from engine.core.recipe import Recipe
from engine.core.slots import Phase, Slot

if TYPE_CHECKING:
    from engine.tasks.base import Encoded, Task
    from engine.train.clock import Clock
    from engine.train.trainables import Trainables


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a hook runs and what it may change."""

    slot: Slot
    hook: str
    when: str


MOMENTS: tuple[Moment, ...] = (
    Moment(
        slot=Slot.DATA_POLICY,
        hook="survey",
        when="once an attempt, before the steps are counted: sees every encoded example; changes nothing",
    ),
    Moment(
        slot=Slot.PARAMETRIZATION,
        hook="calibrate",
        when="once, before attach: sees the untouched model and a few batches; changes nothing",
    ),
    Moment(
        slot=Slot.PARAMETRIZATION,
        hook="attach",
        when="once: may replace modules and freeze weights; step-0 outputs stay equal to the base, unless a choice on the card says otherwise",
    ),
    Moment(slot=Slot.PARAMETRIZATION, hook="trainables", when="once after every attach: names what learns"),
    Moment(slot=Slot.OPTIMIZER, hook="build", when="once, after all trainables are known"),
    Moment(
        slot=Slot.PARAMETRIZATION,
        hook="sync",
        when="after attach, after a restore, and after every optimizer step: derived weights follow what was learned",
    ),
    Moment(
        slot=Slot.DATA_POLICY,
        hook="begin",
        when="every part of every slot: once, before the first step ever; the model still answers like the base",
    ),
    Moment(
        slot=Slot.DATA_POLICY,
        hook="rows",
        when="once to count the steps of an epoch, and at the start of every epoch: chooses and orders example indices",
    ),
    Moment(
        slot=Slot.DATA_POLICY,
        hook="gather",
        when="once a step: may make the micro-batches itself from the examples of the optimizer batch (rollouts)",
    ),
    Moment(slot=Slot.DATA_POLICY, hook="batch", when="for every micro-batch, before it moves to the device"),
    Moment(
        slot=Slot.UPDATE_RULE, hook="update", when="once a step: owns everything from the loss to the optimizer step"
    ),
    Moment(slot=Slot.OBJECTIVE, hook="weight", when="for every micro-batch, before the first of them is computed"),
    Moment(slot=Slot.OBJECTIVE, hook="loss", when="for every micro-batch"),
    Moment(slot=Slot.LOSS_TERM, hook="term", when="for every micro-batch, after the objective"),
    Moment(
        slot=Slot.GRADIENT_RULE, hook="apply", when="once a step, after accumulation; the logged norm was taken before"
    ),
    Moment(
        slot=Slot.SCHEDULE,
        hook="factor",
        when="once a step, before the optimizer moves; once more for each step at which optimizer groups were born, with their own clock",
    ),
    Moment(slot=Slot.OPTIMIZER, hook="step", when="once a step"),
    Moment(
        slot=Slot.PARAMETRIZATION,
        hook="adapt",
        when="after every optimizer step: may grow, prune or re-draw trainables, answered with a Remap; what is born may start a schedule of its own",
    ),
    Moment(slot=Slot.OPTIMIZER, hook="remap", when="whenever adapt returned a Remap"),
    Moment(
        slot=Slot.OBJECTIVE,
        hook="numbers",
        when="every part of every slot: after every step, for its row in the log; read-only but for own counters",
    ),
    Moment(slot=Slot.WATCHER, hook="see", when="after every step and after every evaluation; read-only"),
    Moment(slot=Slot.PARAMETRIZATION, hook="merge", when="once at the end, on the exported copy"),
    Moment(slot=Slot.PARAMETRIZATION, hook="export", when="once at the end"),
)


@dataclass(kw_only=True)
class PartContext:
    """What a method may use to build its parts. The model is not loaded yet."""

    recipe: Recipe
    facts: Facts
    task: Task
    slug: str
    index: int

    def generator(self, part: str) -> torch.Generator:
        """This part's own CPU generator, seeded from (seed, slug, part)."""
        return seeded(self.recipe.settings.seed, self.slug, part)


def seeded(seed: int, *names: str) -> torch.Generator:
    """A CPU generator whose state depends on the seed and the names alone."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Part:
    """Mechanics in a slot. A part that holds state returns it as tensors and JSON, never as pickled objects.

    spares_frozen_blocks: whether what the blocks below everything that learns answer to a text is the same through the whole run while this part is in
    it: it changes, hooks and masks nothing there, lets nothing learn there later, and reads from there only what `heard_blocks` names. Unless every part
    of a run says so, those blocks run in every step (engine.train.frozen).
    """

    spares_frozen_blocks: ClassVar[bool] = False

    def begin(self, run: Any) -> None:
        """Once before the first step ever (not again after a resume), `run` an engine.train.loop.Run: look at the model as it was, e.g. for
        reference log-probabilities; what must survive goes into `state_dict`."""

    def numbers(self) -> Mapping[str, float]:
        """Numbers of the step that was just made, for its row in the log, e.g. {"reward": 0.4}. Asked once a step. They must be the same after
        a resume."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State beyond the trainables: {"name": Tensor | JSON value}. Generators are saved as their uint8 state tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} holds no state but was given {sorted(state)}.")


@dataclass(frozen=True, kw_only=True)
class Remap:
    """How trainables changed: renamed, grown, shrunk or re-drawn.

    `tensors` maps the name of each *new* trainable to (old name or None, index): rows of the optimizer's state are taken at `index`
    (a LongTensor into the flattened old tensor, -1 = fresh zero) — None means "all fresh".
    `replaced` maps names to the new nn.Parameter objects; `removed` names trainables that are gone.
    `born` is the step (`report.step`) after which everything in `replaced` that has no ancestor starts a schedule of its own: it goes into new
    optimizer groups, which rise and fall between that step and the end of the run. With None it joins the groups and the schedule that exist.
    What has an ancestor stays in the ancestor's group.
    """

    replaced: dict[str, nn.Parameter]
    tensors: dict[str, tuple[str | None, Tensor | None]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    born: int | None = None

    def ancestor(self, name: str) -> str | None:
        """The trainable that a new one takes its optimizer state from."""
        return self.tensors.get(name, (None, None))[0]

    def young(self) -> dict[str, nn.Parameter]:
        """What starts a schedule of its own."""
        return {} if self.born is None else {n: p for n, p in self.replaced.items() if self.ancestor(n) is None}


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What a parametrization takes home.

    layout: "peft" (adapter_config.json + adapter_model.safetensors that PeftModel loads) or "bonsai" (ours: adapter.json + adapter.safetensors).
    forms: further exact forms by folder name, e.g. {"lora": Payload(layout="peft", …)}.
    files: JSON to lie beside them, for people, by file name, e.g. {"allocation.json": {…}}; no loader needs it.
    """

    layout: Literal["peft", "bonsai"]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    forms: dict[str, Payload] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)


class Parametrization(Part):
    """What learns. `trainables` returns fp32 parameters by stable dotted names; everything else is frozen by the loop.

    Fresh modules (`task.fresh(model)`: a new classifier without pretrained weights) are trained by the loop itself, beside every parametrization, as
    "fresh.<parameter name>", unless `trainables` already holds those parameters. So do not wrap or copy them; `export` writes their tensors along
    (in the peft layout as "base_model.model.<name>" with `modules_to_save`), `restore` loads them.
    With precision bf16 the loop converts frozen weights to bf16 after attach, keeps trainables in fp32, calls `sync`, and runs forward and loss
    under torch.autocast(bf16); backward runs outside of it.

    A parametrization whose trainables change (`adapt`) keeps in `state_dict` everything that its structure and the model depend on beside the values
    of the trainables. `load_state_dict` rebuilds that structure in the attached model; it runs between `attach` and `trainables` when a run is resumed,
    and once more, on the trained model, when the best checkpoint is put back before export, which may be smaller than the last or have chosen other
    weights. Afterwards `trainables` is asked anew, the saved values are copied in, and `sync` is called.
    """

    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Look at the untouched model on a few batches."""

    def attach(self, model: nn.Module) -> None:
        """Put the mechanics into the model."""
        raise NotImplementedError

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        raise NotImplementedError

    def heard_blocks(self, model: nn.Module) -> Iterable[int]:
        """The frozen blocks, counted from 0, whose answers this part reads itself. Default: none."""
        return ()

    def sync(self, model: nn.Module) -> None:
        """Let derived weights follow the trainables."""

    def adapt(self, report: StepReport) -> Remap | None:
        """Change the set or shape of the trainables."""
        return None

    def merge(self, model: nn.Module) -> bool:
        """Fold what was learned into plain weights, in place: afterwards `model` has its original module types. False when impossible."""
        return False

    def export(self, model: nn.Module) -> Payload | None:
        """The adapter to take home; None when the merged model is the only form. Called before merge."""
        return None

    def restore(self, model: nn.Module, payload: Payload) -> None:
        """Load an exported payload into a freshly attached model."""
        raise NotImplementedError(f"{type(self).__name__} is restored from its merged model only.")


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum over supervised items and their number; the loop divides by the number of the WHOLE optimizer batch."""

    total: Tensor  # scalar, sum over supervised items
    weight: float  # number of supervised items in this micro-batch


class Objective(Part):
    """What is being learned."""

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """Number of supervised items (tokens or examples) of a micro-batch, known before the forward pass."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator) -> Loss:
        raise NotImplementedError


class LossTerm(Part):
    """Something added to the objective: already weighted, per optimizer batch share `share` = micro-batch weight / whole weight."""

    def term(self, model: nn.Module, batch: Mapping[str, Tensor], loss: Loss, share: float) -> Tensor:
        raise NotImplementedError


class GradientRule(Part):
    """Changes gradients between accumulation and the optimizer step. May return numbers for the metric row, e.g. {"clipped": 1.0}."""

    spares_frozen_blocks = True  # it sees what learns, and no model

    def apply(self, trainables: Trainables, norm: Tensor) -> dict[str, Any]:
        raise NotImplementedError


class DataPolicy(Part):
    """Chooses, changes or orders what the model sees.

    `rows` maps the example indices of an epoch to indices (select, augment, mix: phase order); it must depend on (epoch, own state) alone, so
    that a resumed run replays it. It is also asked for epoch 0 before the run, so that the planned steps are those of what is really read.
    `batch` may change a collated micro-batch (format, collate).
    """

    phase: Phase = Phase.SELECT

    def survey(self, encoded: Encoded) -> None:
        """Look at all encoded examples before anything is planned, e.g. to set some aside; the same data must lead to the same state."""

    def rows(self, indices: Sequence[int], epoch: int) -> Sequence[int]:
        return indices

    def gather(self, run: Any, examples: Sequence[Any]) -> list[dict[str, Tensor]] | None:
        """Make the micro-batches of an optimizer batch from its examples, e.g. by letting the model answer them (`run` is an
        engine.train.loop.Run). None, the default: the task collates the examples."""
        return None

    def batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


class OptimizerFactory(Part):
    """Builds the torch optimizer and carries its state over a Remap."""

    spares_frozen_blocks = True

    def build(self, trainables: Trainables, learning_rate: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def remap(self, optimizer: torch.optim.Optimizer, remap: Remap, trainables: Trainables) -> None:
        """Move state rows by `remap.tensors`; what is young is grouped as `build` would group it, so that its weight decay is right.

        The default in engine.train.trainables handles every per-element state tensor.
        """
        from engine.train.trainables import Trainables, remap_optimizer

        young = Trainables(remap.young())
        groups = self.build(young, optimizer.defaults.get("lr", 0.0)).param_groups if len(young) else []
        remap_optimizer(optimizer, remap, trainables, groups)


class Schedule(Part):
    """The learning rate over time, as a factor of the recipe's rate. Depends on the clock alone."""

    spares_frozen_blocks = True

    def factor(self, clock: Clock) -> float:
        raise NotImplementedError

    def warmup_steps(self, clock: Clock) -> int:
        """How many steps rise at the start; watchers judge none of them."""
        return 0


@dataclass(slots=True)
class StepReport:
    """What one optimizer step did. Tensors stay on the device; `row()` reads them once."""

    step: int
    loss: Tensor  # token-weighted loss of the whole optimizer batch, objective alone
    grad_norm: Tensor  # L2 over all trainables after accumulation, before any gradient rule
    learning_rate: float
    samples: int  # seen so far
    tokens: int  # real (not padding) tokens seen so far
    epoch: float
    weight: float  # supervised items of this optimizer batch
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a watcher sees: the row of a step, and the scores when an evaluation followed it."""

    step: int
    samples: int
    planned_samples: int
    planned_steps: int
    row: Mapping[str, Any]  # loss, grad_norm, learning_rate, clipped … as plain floats (NaN stays NaN)
    evaluation: Mapping[str, Any] | None = None  # eval_loss, eval_loss_se, general_loss, learners … or None
    warmup_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A way out that takes one click: where the new run starts, and what its recipe changes.

    title: what the button says, e.g. "Restart from the last good checkpoint with a learning rate of 1e-05".
    changes: new values by dotted recipe names, e.g. {"settings.learning_rate": 1e-5, "methods.0.params.max_norm": 1.0}; `engine.core.recipe.changed`
    applies them.
    """

    title: str
    start: Literal["last_good", "beginning"]
    changes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the data of a signal's event."""
        return {"title": self.title, "start": self.start, "changes": self.changes}


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What a watcher says: an action, the reason in a sentence, the numbers behind it, and a way out where one click can be one."""

    action: Literal["note", "warn", "save", "stop"]
    rule: str
    message: str
    numbers: dict[str, Any] = field(default_factory=dict)
    remedy: Remedy | None = None

    def to_dict(self) -> dict[str, Any]:
        """The data of its event."""
        said: dict[str, Any] = {
            "action": self.action,
            "rule": self.rule,
            "message": self.message,
            "numbers": self.numbers,
        }
        return said if self.remedy is None else {**said, "remedy": self.remedy.to_dict()}


def agreed(signals: Iterable[Signal]) -> list[Signal]:
    """One signal for each rule, in the order in which the rules were first named: where several watchers see the same in one step, the gravest of
    them speaks, with the remedy of whoever knows one."""
    found: dict[str, Signal] = {}
    for signal in signals:
        known = found.get(signal.rule, signal)
        graver = signal if GRAVITY.index(signal.action) > GRAVITY.index(known.action) else known
        found[signal.rule] = replace(graver, remedy=known.remedy or signal.remedy)
    return list(found.values())


GRAVITY = ("note", "save", "warn", "stop")


class Watcher(Part):
    """Looks and speaks; changes no bit of the run. "stop" ends the run gracefully with everything kept."""

    spares_frozen_blocks = True

    def see(self, look: Look) -> Iterable[Signal]:
        raise NotImplementedError


class UpdateRule(Part):
    """Owns the step. `run` is an engine.train.loop.Run; `micro` are the collated micro-batches of one optimizer batch, on the device."""

    def cuts(self, step: int) -> bool:
        """Whether an optimizer batch that is one micro-batch comes in two halves at this step (every second example each), to measure chance."""
        return False

    def update(self, run: Any, micro: list[dict[str, Tensor]]) -> StepReport:
        raise NotImplementedError
