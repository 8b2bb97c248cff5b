"""A method is the identity of a paper or a baseline, declared once: card, hyperparameters, needs, presets, roles.

A method lives in one file, `engine/methods/<slug with underscores>.py`, or behind an entry point of the group "bonsai.methods". The form, the
REST schema, the help page, the conformance cases and the benchmark row are all derived from its class.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.params import HyperParams, faults_of
from engine.core.slots import Arity, Phase, Slot

if TYPE_CHECKING:
    from engine.core.overrides import KeepOrStop
    from engine.core.recipe import MethodRef, Recipe
    from engine.core.work import Ask, Outcome, Report, Step, Trial

Training = Literal["none", "optional", "required"]
TRIAL_STATES = ("waiting", "running", "stopped", "finished", "failed")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One headline number of a paper, and ours beside it once it is measured."""

    claim: str
    paper: str
    ours: str = ""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Marks from 1 (light) to 5 (heavy), relative to the other methods, for time per step, memory, and size of the result."""

    time: int
    memory: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a person reads about a method."""

    slug: str
    title: str
    pick_when: str  # "Pick this when …", for a person who knows no machine learning
    summary: str  # one paragraph, plain
    paper: str = ""
    year: int | None = None
    arxiv: str = ""
    algorithm: tuple[str, ...] = ()  # numbered steps
    avoid_when: str = ""
    traps: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    cost: Cost | None = None
    family: str = "baseline"  # heading in the catalogue
    first_choice: bool = False  # whether a person who knows no better does well with it on ordinary data


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Conditions that can be checked from facts alone; empty means "anything"."""

    tasks: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()  # of model: "encoder", "decoder"
    linear_layers: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a method fits; when it does not, why and what would."""

    ok: bool
    why: str = ""
    way_out: str = ""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a method lets the model write while it learns, for the estimate."""

    attempts: int  # answers to each example
    at_once: int  # answers that are written together at most
    tokens: int  # of one answer, at most
    rows: int = 0  # answers of a micro-batch; 0: as many as the recipe's batch size
    reference: bool = False  # whether a second, untouched model judges them


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Advice for one setting, with its reason. `where` is "settings.learning_rate" or "methods[i].params.r"."""

    where: str
    value: Any
    reason: str


class Method:
    """Base of every method. Subclasses add one role (TrainMethod, TransformMethod …) and the hooks of that role."""

    card: ClassVar[Card]
    needs: ClassVar[Needs] = Needs()
    presets: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {}, "paper": {}}
    version: ClassVar[str] = "1"
    cannot: ClassVar[
        dict[str, str]
    ] = {}  # conformance point -> reason, e.g. {"merge": "The mask depends on the input."}

    class Params(HyperParams):
        """No hyperparameters."""

    def __init__(self, params: HyperParams | None = None) -> None:
        self.params: Any = params if params is not None else self.Params()

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        """Say whether this method fits the facts. The default reads `needs`."""
        needs, title = cls.needs, cls.card.title
        if needs.tasks and facts.task not in needs.tasks:
            return Verdict(
                False,
                f"{title} is made for the goal {' or '.join(needs.tasks)}, not for {facts.task}.",
                f"Choose another method, or the goal {needs.tasks[0]}.",
            )
        if needs.kinds and facts.model.kind not in needs.kinds:
            return Verdict(
                False,
                f"{title} works on {' or '.join(needs.kinds)} models and this model is {facts.model.a_kind}.",
                "Choose another model or another method.",
            )
        if needs.linear_layers and not facts.model.linears:
            return Verdict(
                False,
                f"{title} edits linear layers and this model shows none that it knows.",
                "Choose a transformer model, or full fine-tuning.",
            )
        return Verdict(True)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        """Faults that depend on hyperparameters and facts together, `where` relative to the params ("r"). Default: none."""
        return []

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        """Advice for settings that the recipe leaves open. Default: none."""
        return []

    @classmethod
    def parse(cls, data: dict[str, Any], prefix: str) -> tuple[Any, list[Fault]]:
        """Validate hyperparameters: (params, []) or (None, faults)."""
        try:
            return cls.Params.model_validate(data), []
        except ValidationError as error:
            return None, faults_of(error, prefix, cls.Params)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Everything a form, an API or a page needs, as JSON."""
        return {
            **asdict(cls.card),
            "role": cls.role,
            "num_models": list(getattr(cls, "num_models", (1, 1))),
            "needs_data": getattr(cls, "needs_data", cls.role == "train"),
            "training": getattr(cls, "training", "none"),
            "overrides": list(getattr(cls, "overrides", ())),
            "slots": [slot.value for slot in cls.slots],
            "version": cls.version,
            "needs": asdict(cls.needs),
            "presets": cls.presets,
            "cannot": cls.cannot,
            "default": cls.default,
            "schema": cls.Params.model_json_schema(),
        }

    role: ClassVar[str] = ""
    slots: ClassVar[tuple[Slot, ...]] = ()
    # stands in its slot when the recipe names nobody; in a slot that holds many, beside all others, unless the recipe names it with dials of its own
    default: ClassVar[bool] = False


class TrainMethod(Method):
    """Fills one or more slots of a training run."""

    role = "train"
    phase: ClassVar[Phase | None] = None  # of a data policy

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        """Names of the base tensors this method changes or replaces. Two parametrizations may not claim one tensor."""
        return frozenset()

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        """How many numbers would learn, for the estimate. Default: the size of the claimed tensors."""
        return sum(facts.model.size(name) for name in cls.claims(params, facts))

    @classmethod
    def backward_share(cls, params: Any, facts: Facts) -> float:
        """How much of the model's work and memory for going backward this parametrization needs, for the estimate. Default: all of it, 1.

        Backward runs through every block above the lowest claimed tensor, which the estimate sees by itself; a method that learns beside the model needs less.
        """
        return 1.0

    @classmethod
    def input_share(cls, params: Any, facts: Facts) -> float:
        """How much of the inputs of the claimed matrices is remembered for going backward, for the estimate. Default: all of it, 1."""
        return 1.0

    @classmethod
    def written(cls, params: Any) -> Written | None:
        """What the model writes while it learns. Default: nothing."""
        return None

    def parts(self, ctx: Any) -> Sequence[Any]:
        """Build the parts, one for each slot in `slots`, in that order. `ctx` is an engine.train.parts.PartContext."""
        raise NotImplementedError(f"{type(self).__name__} declares no parts.")


class WorkMethod(Method):
    """Leads an operation other than *train*: a recipe of that operation names exactly one such method."""

    num_models: ClassVar[tuple[int, int | None]] = (1, 1)  # how many models it takes, `model` and `models` together
    needs_data: ClassVar[bool] = False
    training: ClassVar[Training] = "none"  # whether the recipe's other methods form an inner training recipe

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        """How many trainings of the inner recipe it costs, for the estimate. Default: none."""
        return 0.0

    @classmethod
    def check_inner(cls, params: Any, recipe: Recipe) -> list[Fault]:
        """Faults that depend on hyperparameters and the resolved inner training recipe together, `where` relative to the params."""
        return []


class TransformMethod(WorkMethod):
    """Weights in, weights out, tensor by tensor: merge, prune, factorise, compress, graft."""

    role = "transform"

    def apply(self, inputs: Any, out: Any, ctx: Any) -> None:
        """Write new weights. inputs: engine.ops.transform.ModelFolder, recipe.model first; out: OutFolder; ctx: TransformContext."""
        raise NotImplementedError(f"{type(self).__name__} does not transform.")


class GenerateMethod(WorkMethod):
    """Makes data: synthesise, label, filter, search."""

    role = "generate"
    needs_data = True

    def items(self, inputs: Any, ctx: Any) -> Sequence[Any]:
        """What there is to work on, in order; deterministic. inputs: engine.ops.work.Inputs, ctx: engine.ops.work.WorkContext."""
        raise NotImplementedError(f"{type(self).__name__} generates nothing.")

    def rows(self, item: Any, inputs: Any, ctx: Any) -> Iterator[dict[str, Any]]:
        """The rows made from one item. `ctx.generator(name)` is the item's own, so that an interrupted job goes on at the next item."""
        raise NotImplementedError(f"{type(self).__name__} generates nothing.")


class ProbeMethod(WorkMethod):
    """Measures a model or data, and reports."""

    role = "probe"
    needs_data = True

    def measure(self, inputs: Any, ctx: Any) -> Report:
        """inputs: engine.ops.work.Inputs, ctx: engine.ops.work.WorkContext."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")


class SearchMethod(WorkMethod):
    """Finds better settings of the inner training recipe by running trials of it. `ask` and `tell` must be deterministic: an interrupted search is
    replayed from its record."""

    role = "search"
    needs_data = True
    training = "required"
    overrides: ClassVar[
        tuple[KeepOrStop, ...]
    ] = ()  # what a person may decide about a single trial while the search runs

    def begin(self, ctx: Any) -> None:
        """Once at the start. ctx: engine.ops.search.SearchContext (recipe, total_steps, steps_of, rng)."""

    def ask(self, trials: Sequence[Trial]) -> list[Ask]:
        """What to run next, given every trial so far; an empty list ends the search. New numbers start new trials."""
        raise NotImplementedError(f"{type(self).__name__} asks for nothing.")

    def tell(self, trial: Trial) -> None:
        """A slice was run: its mark is the last of `trial.marks`. When a person stopped the trial, the slice may have ended before its step."""

    def heed(self, trial: Trial) -> None:
        """A person has decided about a trial, in one of the ways of `overrides`: `trial.override` says what. Called between two slices, before `tell`.

        `ask` must keep to it. The default notes nothing, for searches that read `trial.is_stopped` when they ask.
        """

    def standing(self, trial: Trial) -> tuple[str, str]:
        """What the table of a running search says of a trial: a word of TRIAL_STATES, and a sentence with the reason, or nothing.

        Asked after every slice. The default knows nothing of verdicts: a trial that has not reached its end waits.
        """
        if trial.failed:
            return "failed", trial.failed
        if trial.is_stopped and trial.override is not None:
            return "stopped", trial.override.sentence
        return ("finished", "") if trial.marks and trial.step >= trial.marks[-1].total_steps else ("waiting", "")

    def winner(self, trials: Sequence[Trial]) -> int:
        """The trial to take home. Default: the best last score among those that went furthest."""
        alive = [trial for trial in trials if not trial.failed and trial.marks]
        if not alive:
            raise ValueError("No trial has a score.")
        far = max(trial.step for trial in alive)
        return max((t for t in alive if t.step == far), key=lambda trial: (trial.score, -trial.number)).number

    def report(self, trials: Sequence[Trial], winner: int) -> Report:
        """What the search found."""
        raise NotImplementedError(f"{type(self).__name__} reports nothing.")


class FlowMethod(WorkMethod):
    """Several operations in a row: a generator that yields steps and receives their results. It must be deterministic given the results: an
    interrupted flow is played again, and finished steps are read from the disk."""

    role = "flow"
    needs_data = True

    def plan(self, ctx: Any) -> Generator[Step | list[Step], Any, Outcome]:
        """Yield a Step (answered with its StepResult) or a list of them (answered with a list). ctx: engine.ops.flow.FlowContext."""
        raise NotImplementedError(f"{type(self).__name__} plans nothing.")


class PredictMethod(Method):
    """How a finished result answers: with a memory, with retrieval, learning while it serves. Chosen where a result is asked, not in a recipe."""

    role = "predict"

    def predictor(self, model: Any, tokenizer: Any, data: Any, task: Any) -> Any:
        """An engine.tasks.base.Predictor around a loaded model. What it learns while serving goes through its `state_dict`."""
        raise NotImplementedError(f"{type(self).__name__} predicts nothing.")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A method with its parsed hyperparameters, as it stands in a run."""

    method: type[Any]  # of TrainMethod in a training run, of WorkMethod where it leads another operation
    params: Any
    index: int | None  # position in recipe.methods; None for a default that the composition added

    @property
    def slug(self) -> str:
        return str(self.method.card.slug)

    @property
    def where(self) -> str:
        return f"methods[{self.index}]" if self.index is not None else "methods"


@dataclass(frozen=True)
class Composition:
    """The methods of a run, slot by slot, defaults filled in."""

    chosen: tuple[Chosen, ...]
    by_slot: dict[Slot, tuple[Chosen, ...]] = field(default_factory=dict)

    def in_slot(self, slot: Slot) -> tuple[Chosen, ...]:
        return self.by_slot.get(slot, ())


def arity_faults(chosen: Sequence[Chosen]) -> Iterator[Fault]:
    """The composition law for slots that hold exactly one part."""
    for slot in Slot:
        holders = [item for item in chosen if slot in item.method.slots and item.index is not None]
        if slot.arity is Arity.ONE and len(holders) > 1:
            names = " and ".join(item.method.card.title for item in holders)
            yield Fault(
                where=holders[1].where,
                what=f"{names} both want to be the {slot.words}.",
                why=slot.law,
                way_out=f"Keep {holders[0].method.card.title} and remove the other, or the other way round.",
                code="slot_taken",
            )


def method_ref_fault(ref: MethodRef, index: int, known: Sequence[str]) -> Fault:
    """The fault for a slug that nobody declares."""
    import difflib

    close = difflib.get_close_matches(ref.slug, known, n=1)
    return Fault(
        where=f"methods[{index}].slug",
        what=f"There is no method called '{ref.slug}'.",
        why="It is neither built in nor offered by an installed package.",
        way_out=f"Did you mean '{close[0]}'?" if close else f"Choose one of: {', '.join(sorted(known))}.",
        code="unknown_method",
    )
