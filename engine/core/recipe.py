"""A recipe says everything about a run. It is the only thing that crosses a process border, and it has a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engine.core.errors import Fault, RecipeError
from engine.core.params import HyperParams, dial, faults_of

Operation = Literal["train", "transform", "generate", "probe", "search", "flow"]
MAX_RECIPE_BYTES = 256_000


class Frozen(BaseModel):
    """A frozen value with no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodRef(Frozen):
    """A method by slug, with the hyperparameters that differ from its defaults."""

    slug: str = Field(min_length=1, max_length=80, pattern=r"^[a-z0-9][a-z0-9-]*$")
    params: dict[str, Any] = Field(default_factory=dict)


class ModelRef(Frozen):
    """Where the weights come from: "starter:NAME", "folder:/path", "hub:owner/name" or "hub:owner/name@revision"."""

    source: str = Field(min_length=1, max_length=1000)


class DataRef(Frozen):
    """Where the rows come from ("starter:NAME" or "file:/path"), which columns play which role, and what they must hash to."""

    source: str = Field(min_length=1, max_length=1000)
    columns: dict[str, str] = Field(default_factory=dict)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class TrainSettings(HyperParams):
    """What every training run shares. None means: let the studio suggest a value and say why."""

    learning_rate: float | None = dial(
        None,
        label="Learning rate",
        unit="1",
        low=0.0,
        high=10.0,
        tier="basic",
        live=True,
        suggested="It depends on the method.",
        help="How big a correction the model makes after each batch. Too high and it stumbles, too low and it learns nothing.",
    )
    epochs: float | None = dial(
        None,
        label="Passes over the data",
        unit="epochs",
        low=0.01,
        high=1000,
        tier="basic",
        suggested="Small data needs more passes.",
        help="How many times the model reads all the examples. More passes learn more, until it starts to memorise.",
    )
    batch_size: int | None = dial(
        None,
        label="Examples at a time",
        unit="examples",
        low=1,
        high=4096,
        tier="basic",
        suggested="It depends on memory.",
        help="How many examples are read before each correction. More is steadier and needs more memory.",
    )
    max_length: int | None = dial(
        None,
        label="Longest text",
        unit="tokens",
        low=8,
        high=131072,
        tier="basic",
        suggested="Long enough for 99 % of the examples.",
        help="Longer texts are cut at this many tokens; a token is a word or a piece of one.",
    )
    accumulate: int = dial(
        1,
        label="Batches per correction",
        unit="batches",
        low=1,
        high=1024,
        help="Adds up this many batches before one correction: a large batch in little memory.",
    )
    max_steps: int | None = dial(
        None,
        label="Stop after",
        unit="steps",
        low=1,
        high=10_000_000,
        help="Stops after this many corrections, whatever the passes say.",
    )
    max_minutes: float | None = dial(
        None,
        label="Time limit",
        unit="minutes",
        low=0.05,
        high=100_000,
        help="Stops, keeps and exports what was learned when the time is over.",
    )
    precision: Literal["auto", "fp32", "bf16"] = dial(
        "auto",
        label="Number format",
        suggested="bf16 where the hardware computes it quickly, fp32 elsewhere.",
        help="bf16 halves the memory for the frozen weights and activations and is quicker; what learns is always kept in fp32.",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = dial(
        "auto",
        label="Recompute instead of remember",
        suggested="Only where the run would not fit into memory otherwise.",
        help="Saves memory by computing activations twice; about a fifth slower. auto does so only when the run would not fit otherwise.",
    )
    activation_offload: Literal["auto", "on", "off"] = dial(
        "auto",
        label="Park activations in main memory",
        suggested="Only on a GPU, where recomputing alone is not enough.",
        help="Keeps what the backward pass needs in the memory of the computer instead of the GPU's: slower, but longer texts fit.",
    )
    frozen_cache: Literal["auto", "on", "off"] = dial(
        "auto",
        label="Remember the frozen part",
        help="Where nothing learns in the lower blocks of the model, they run once for each text and their answer is read from the disk afterwards. "
        "auto does so where it changes nothing and pays; on also leaves out what these blocks would drop at random while learning.",
    )
    compile: Literal["auto", "on", "off"] = dial(
        "auto",
        label="Compile the blocks",
        suggested="Only where a long run on a GPU pays the compiling back.",
        help="Makes quicker code of the model's repeated blocks at the first step, which takes a minute or more. "
        "auto does so only where the run is long enough to win that time back.",
    )
    packing: bool = dial(
        True,
        label="Pack short texts together",
        help="Puts several short texts into one row, kept apart by a mask, so that no work is wasted on padding.",
    )
    holdout: float = dial(
        0.15,
        label="Kept back for testing",
        unit="share",
        low=0.01,
        high=0.5,
        help="This share of the examples is never learned from, only used to measure.",
    )
    evaluations: int = dial(
        8,
        label="Measurements",
        unit="times",
        low=1,
        high=1000,
        help="How often the kept-back examples are scored during the run.",
    )
    live_samples: int = dial(
        2,
        label="Answers while it learns",
        unit="examples",
        low=0,
        high=6,
        help="At every measurement so many kept-back examples are answered, so that you see how the answers change. 0 shows them at the end only.",
    )
    checkpoint_every: int | None = dial(
        None,
        label="Save every",
        unit="steps",
        low=1,
        high=1_000_000,
        suggested="About ten times per run.",
        help="How often the run is saved so that it can go on after an interruption.",
    )
    keep_checkpoints: int = dial(
        2,
        label="Saved states kept",
        unit="states",
        low=1,
        high=1000,
        help="So many of the newest saved states stay on the disk, and the best one besides. Another run can start from each of them.",
    )
    seed: int = dial(
        17,
        label="Seed",
        unit="1",
        low=0,
        high=2**31 - 1,
        help="The same seed gives the same run, bit for bit on a CPU.",
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        """Older recipes say true or false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Recipe(Frozen):
    """A frozen value that says everything about a run."""

    version: Literal[1] = 1
    name: str = Field(default="", max_length=200)
    operation: Operation = "train"
    task: str = Field(min_length=1, max_length=40)
    model: ModelRef
    models: tuple[ModelRef, ...] = ()  # further models: what a merge puts together, what a reset goes back to
    data: DataRef | None = None  # training needs it; a merge, for example, does not
    methods: tuple[MethodRef, ...] = ()
    settings: TrainSettings = Field(default_factory=TrainSettings)

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, without the name: two recipes with one fingerprint are the same work."""
        return hashlib.sha256(canonical(self.model_dump(mode="json", exclude={"name"})).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with new values at dotted names, checked like one that was typed: {"settings.learning_rate": 1e-5, "methods.0.params.r": 4};
    "methods.+" holds references of methods to add, {"slug": …, "params": {…}}."""
    body = recipe.model_dump(mode="json")
    for name, value in changes.items():
        *path, last = name.split(".")
        place: Any = body
        for step in path:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        if isinstance(place, list) and last == "+":
            place.extend(value)
        elif isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    return parse_recipe(body)


def canonical(value: Any) -> str:
    """One spelling per JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def parse_recipe(data: Any) -> Recipe:
    """Read a recipe from parsed JSON or YAML; every fault at once as a RecipeError."""
    if not isinstance(data, dict):
        raise RecipeError(
            [
                Fault(
                    where="recipe",
                    what="This is not a recipe.",
                    why=f"A recipe is a mapping; this is a {type(data).__name__}.",
                    way_out="Start from a recipe exported by the studio.",
                    code="not_a_recipe",
                )
            ]
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_recipe_faults(error)) from None


def parse_recipe_text(text: str) -> Recipe:
    """Read a recipe from YAML or JSON text (safe loader, bounded size, no aliases)."""
    problem = ""
    if len(text.encode()) > MAX_RECIPE_BYTES:
        problem = f"It is longer than {MAX_RECIPE_BYTES:,} bytes."
    else:
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                problem = "It uses YAML aliases, which a recipe never needs."
            else:
                return parse_recipe(yaml.safe_load(text))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = f"Line {mark.line + 1} is not valid YAML." if mark else "It is not valid YAML."
        except RecursionError:
            problem = "It is nested too deeply."
    raise RecipeError(
        [
            Fault(
                where="recipe",
                what="This recipe could not be read.",
                why=problem,
                way_out="Correct it or export a fresh recipe from the studio.",
                code="unreadable_recipe",
            )
        ]
    )


def _recipe_faults(error: ValidationError) -> list[Fault]:
    models: dict[str, type[BaseModel]] = {
        "settings": TrainSettings,
        "model": ModelRef,
        "data": DataRef,
        "methods": MethodRef,
    }
    faults: list[Fault] = []
    for item in error.errors(include_url=False):
        head = str(item["loc"][0]) if item["loc"] else ""
        inner = models.get(head)
        depth = 2 if head == "methods" else 1
        if inner is None or len(item["loc"]) <= depth:
            faults += _one(item, "", Recipe)
        else:
            prefix = f"methods[{item['loc'][1]}]" if head == "methods" else head
            faults += _one({**item, "loc": item["loc"][depth:]}, prefix, inner)
    return faults


def _one(item: Any, prefix: str, model: type[BaseModel]) -> list[Fault]:
    class _Single:
        def errors(self, include_url: bool = False) -> list[Any]:
            return [item]

    return faults_of(_Single(), prefix, model)  # type: ignore[arg-type]
