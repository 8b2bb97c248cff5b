"""Models of one shape side by side: which tensors are merged, their task vectors, exact quantiles of vectors too long for memory.

Everything works tensor by tensor in fp32 (fp64 stays fp64). A task vector is a fine-tuned weight minus the weight it was made from.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import TransformMethod, Verdict
from engine.core.params import dial
from engine.io.tensors import tensor_hash
from engine.train.parts import seeded

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext

Heads = Literal["refuse", "base", "first"]
PIECE = 1 << 22  # numbers of one model that are worked on at a time
_LAYER = re.compile(r"(^|\.)\d+\.")  # "layers.3." : a part of the body, never a head
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|classifier|score|cls|qa_outputs|pre_classifier|pooler|heads?|output_layer)\."
)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)\.")
_BINS = 1 << 16
_SETTINGS = {".json", ".txt", ".model", ".jinja"}  # configuration, tokenizer, vocabulary, chat template
_NOT_SETTINGS = {"model.safetensors.index.json", "transform.json", "adapter_config.json"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that belong together: the same tensors, name by name; every name below is the template's.

    `names` are the float tensors that are merged, each tied weight once; `twins` maps a tied copy to the name that it repeats; `copied` says for
    all other tensors whose value is taken. `layout` is what will be written.
    """

    base: ModelFolder | None
    models: tuple[ModelFolder, ...]
    template: ModelFolder
    template_index: int  # among the inputs: whose configuration and tokenizer go along
    names: tuple[str, ...]
    twins: dict[str, str]
    copied: dict[str, ModelFolder]
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    alias: dict[int, dict[str, str]] = field(repr=False)  # id of a folder -> template name -> its own name
    moved: set[int] = field(default_factory=set, repr=False)  # models that were seen to differ from the base

    def num_elements(self) -> int:
        """How many numbers are merged, tied copies counted once."""
        return sum(torch.Size(self.layout[name][1]).numel() for name in self.names)

    def read(self, folder: ModelFolder, name: str) -> Tensor:
        """One tensor for computing, fp32 or fp64; refused when it holds something that is no number."""
        own = self.alias[id(folder)][name]
        tensor = folder[own]
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if not torch.isfinite(tensor).all():
            raise bad_input(
                folder.where,
                f"The weight {own} of {folder.folder.name} holds values that are infinite or not a number.",
                "One such value would spoil every place that it is merged into; the run that made this model diverged.",
                "Use an earlier checkpoint of this model, or leave the model out.",
                "not_finite",
            )
        return tensor

    def task_vectors(self, name: str) -> Tensor:
        """theta_i - theta_base, flattened: [n, d]."""
        assert self.base is not None
        start = self.read(self.base, name).reshape(-1)
        vectors = torch.empty(len(self.models), start.numel(), dtype=start.dtype)
        for place, model in enumerate(self.models):
            torch.sub(self.read(model, name).reshape(-1), start, out=vectors[place])
            if place not in self.moved and vectors[place].any():
                self.moved.add(place)
        return vectors

    def stream(self, names: Sequence[str] | None = None) -> Iterator[Tensor]:
        """Task vectors in pieces [n, <= PIECE] over all tensors in a fixed order."""
        for name in self.names if names is None else names:
            yield from self.task_vectors(name).split(PIECE, dim=1)

    def write(self, out: OutFolder, ctx: TransformContext, merge: Callable[[str], Tensor]) -> None:
        """Write the result tensor by tensor; `merge(name)` gives the new values of a merged tensor in any float type and any shape."""
        if self.template_index:
            copy_settings(self.template.folder, out.folder)
        with out.weights(self.layout) as writer:
            for done, name in enumerate(writer.order):
                dtype, shape = self.layout[name]
                source = self.twins.get(name, name)
                if source in self.copied:
                    folder = self.copied[source]
                    tensor = folder[self.alias[id(folder)][source]].to(dtype)
                else:
                    tensor = merge(source).reshape(shape).to(dtype)
                writer.put(name, tensor)
                ctx.progress(done + 1, len(writer.order))

    def write_changes(self, out: OutFolder, ctx: TransformContext, change: Callable[[str, Tensor], Tensor]) -> None:
        """Write base + change; `change(name, task vectors [n, d])` gives the merged task vector [d]."""
        base = self.base
        assert base is not None
        norms = torch.zeros(len(self.models) + 1, dtype=torch.float64)

        def merged(name: str) -> Tensor:
            vectors, start = self.task_vectors(name), self.read(base, name).reshape(-1)
            norms[:-1] += vectors.double().square().sum(1)
            norms[-1] += start.double().square().sum()
            return start + change(name, vectors)

        self.write(out, ctx, merged)
        self.require_moved()
        distances = (norms[:-1] / norms[-1].clamp(min=1e-30)).sqrt()
        ctx.report["distance_from_base"] = {
            model.folder.name: round(float(far), 6) for model, far in zip(self.models, distances, strict=True)
        }
        for model, far in zip(self.models, distances, strict=True):
            if far > 1:
                ctx.note(
                    f"{model.folder.name} is farther from the base than the base is from zero: it was probably made from another model."
                )

    def require_moved(self) -> None:
        """Refuse a fine-tuned model that is its base; call after all task vectors were read."""
        for place, model in enumerate(self.models):
            if place not in self.moved:
                raise bad_input(
                    model.where,
                    f"{model.folder.name} is exactly the base model.",
                    "Without any change there is nothing to merge; perhaps the base was also given as a fine-tuned model.",
                    "Give the base as the model and only fine-tuned models as the further models.",
                    "no_difference",
                )


def heads_dial(*choices: str) -> Any:
    """The dial that says what becomes of weights outside of the layers in which the models differ."""
    meaning = {
        "refuse": "'refuse' stops and says which they are",
        "base": "'base' keeps those of the base",
        "first": "'first' keeps those of the first fine-tuned model"
        if "base" in choices
        else "'first' keeps those of the first model",
    }
    return dial(
        "refuse",
        label="Output layers that differ",
        help=f"What to do when the models have different output layers or vocabularies, which cannot be merged: {'; '.join(meaning[c] for c in choices)}.",
    )


# ── do they belong together ───────────────────────────────────────────────────────────────────────────────────────────


def siblings(inputs: Sequence[ModelFolder], ctx: TransformContext, *, heads: Literal["refuse", "first"]) -> Family:
    """Models of equal standing: all inputs are merged."""
    return _family(inputs, ctx, base=None, template=0, heads=heads)


def descendants(inputs: Sequence[ModelFolder], ctx: TransformContext, *, heads: Heads) -> Family:
    """A base and models that were fine-tuned from it: inputs[0] is the base, the others are merged."""
    return _family(inputs, ctx, base=inputs[0], template=1 if heads == "first" else 0, heads=heads)


def require_count(inputs: Sequence[ModelFolder], low: int, high: int | None, title: str, order: str) -> None:
    """Refuse a wrong number of models; `order` says which model goes where."""
    if len(inputs) < low or (high is not None and len(inputs) > high):
        number = f"{low}" if high == low else f"{low} or more" if high is None else f"{low} to {high}"
        raise bad_input(
            "models",
            f"{title} needs {number} models and was given {len(inputs)}.",
            f"The order is: {order}.",
            "Add or remove models.",
            "wrong_number",
        )


def _family(
    inputs: Sequence[ModelFolder], ctx: TransformContext, *, base: ModelFolder | None, template: int, heads: Heads
) -> Family:
    model = inputs[template]
    alias = {id(folder): _alias(model, folder) for folder in inputs}
    names, layout, copied = [], {}, {}
    odd: list[tuple[str, ModelFolder, str]] = []  # tensor, folder, what differs
    for name, (dtype, shape) in sorted(model.layout.items()):
        layout[name] = (dtype, shape)
        donor = base if base is not None and base.layout.get(alias[id(base)].get(name, "")) == (dtype, shape) else model
        if not dtype.is_floating_point:
            copied[name] = donor
            continue
        problem = next(
            ((folder, text) for folder in inputs if (text := _problem(folder, alias[id(folder)], name, shape))), None
        )
        if problem is not None:
            odd.append((name, *problem))
            copied[name] = model
            continue
        names.append(name)
        for folder in inputs:
            wide = torch.promote_types(layout[name][0], folder.layout[alias[id(folder)][name]][0])
            layout[name] = (wide, shape)
    for folder in inputs:
        known = set(alias[id(folder)].values())
        odd += [
            (name, folder, "is only there")
            for name, (dtype, _) in sorted(folder.layout.items())
            if name not in known and dtype.is_floating_point
        ]
    _refuse(inputs, odd, names, model, heads)
    twins = _twins(inputs, alias, names, layout)
    if odd:
        ctx.report["not_merged"] = sorted({name for name, _, _ in odd})
        ctx.note(f"Not merged, since the models differ in them: {', '.join(sorted({name for name, _, _ in odd})[:6])}.")
    tuned = inputs[1:] if base is not None else inputs
    return Family(
        base=base,
        models=tuple(tuned),
        template=model,
        template_index=template,
        names=tuple(name for name in names if name not in twins),
        twins=twins,
        copied=copied,
        layout=layout,
        alias=alias,
    )


def _problem(folder: ModelFolder, alias: Mapping[str, str], name: str, shape: tuple[int, ...]) -> str:
    own = alias.get(name)
    if own is None:
        return "is missing"
    dtype, theirs = folder.layout[own]
    if theirs != shape:
        return f"has the shape {list(theirs)} instead of {list(shape)}"
    return "" if dtype.is_floating_point else f"holds {dtype} instead of ordinary numbers"


def _refuse(
    inputs: Sequence[ModelFolder],
    odd: Sequence[tuple[str, ModelFolder, str]],
    names: Sequence[str],
    template: ModelFolder,
    heads: Heads,
) -> None:
    """Raise when more differs than heads, or when heads may not differ."""
    inside = next((item for item in odd if _LAYER.search(item[0])), None)
    if inside is not None or not names:
        name, folder, text = inside or (odd or [("every weight", template, "is of another kind")])[0]
        raise bad_input(
            folder.where,
            f"These models do not belong together: {name} {text} in {folder.folder.name}.",
            "Merging adds up the numbers at equal places, so all models must be fine-tuned from one and the same base.",
            "Choose models that were made from one base by training whole weights, or merge their adapters into them first.",
            "shapes_differ",
        )
    if odd and heads == "refuse":
        name, folder, text = odd[0]
        raise bad_input(
            folder.where,
            f"The models differ outside of their layers: {name} {text} in {folder.folder.name}.",
            "That is usually an output layer for other labels, or a longer vocabulary; its numbers mean different things in each model.",
            "Set 'Output layers that differ' to say whose are kept; everything else can be merged.",
            "heads_differ",
        )


def _alias(template: ModelFolder, folder: ModelFolder) -> dict[str, str]:
    """Template name -> name in the folder. A model saved with a head has a prefix ("bert.") that one without lacks."""
    direct = {name: name for name in template.layout if name in folder.layout}
    if 2 * len(direct) >= min(len(template.layout), len(folder.layout)):
        return direct
    best = direct
    for prefix in {name.partition(".")[0] + "." for name in (*template.layout, *folder.layout)}:
        longer = {name: prefix + name for name in template.layout if prefix + name in folder.layout}
        shorter = {
            name: name.removeprefix(prefix)
            for name in template.layout
            if name.startswith(prefix) and name.removeprefix(prefix) in folder.layout
        }
        best = max(best, longer, shorter, key=len)
    return best


def _twins(
    inputs: Sequence[ModelFolder],
    alias: Mapping[int, Mapping[str, str]],
    names: Sequence[str],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, str]:
    """Weights outside of the layers that are stored twice with equal values in every model (word table and output layer)."""
    groups: dict[tuple[torch.dtype, tuple[int, ...]], list[str]] = {}
    for name in names:
        if len(layout[name][1]) >= 2 and not _LAYER.search(name):
            groups.setdefault(layout[name], []).append(name)
    twins: dict[str, str] = {}
    for group in groups.values():
        if len(group) < 2:
            continue
        seen: dict[tuple[str, ...], str] = {}
        for name in group:
            value = tuple(tensor_hash(folder[alias[id(folder)][name]]) for folder in inputs)
            first = seen.setdefault(value, name)
            if first != name:
                twins[name] = first
    return twins


def copy_settings(source: Path, target: Path) -> None:
    """Take configuration and tokenizer along from another input than the first."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _SETTINGS and file.name not in _NOT_SETTINGS:
            shutil.copyfile(file, target / file.name)


class MergeMethod(TransformMethod):
    """What every merge asks of its models: equal layers, and as many of them as it takes."""

    order: ClassVar[str] = "the model is the base, the further models are fine-tuned from it"  # which model goes where

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        """The models must have the same layers."""
        verdict = super().supports(facts)
        return fits_together(facts, cls.card.title) if verdict.ok else verdict

    def require_models(self, inputs: Sequence[ModelFolder]) -> None:
        """Refuse a wrong number of models."""
        require_count(inputs, *self.num_models, self.card.title, self.order)


def fits_together(facts: Facts, title: str) -> Verdict:
    """What names and shapes alone tell about the models of a merge: within the layers they must be the same."""
    for place, other in enumerate(facts.models, 1):
        for name, shape in facts.model.tensors.items():
            theirs = other.tensors.get(name)
            if _LAYER.search(name) and theirs != shape:
                text = "is missing" if theirs is None else f"has the shape {list(theirs)} instead of {list(shape)}"
                return Verdict(
                    False,
                    f"{title} adds up numbers at equal places, and in model {place + 1} {name} {text}.",
                    "Choose models that were fine-tuned from one and the same base.",
                )
    return Verdict(True)


def count_fault(text: str, facts: Facts, where: str, *, base: bool) -> list[Fault]:
    """A list of numbers that does not have one for each model; no fault while the models are not known."""
    given, wanted = len(numbers(text)), len(facts.models) + (0 if base else 1)
    if not facts.models or given in (0, wanted):
        return []
    return [
        Fault(
            where=where,
            what=f"There are {given} numbers for {wanted} {'fine-tuned models' if base else 'models'}.",
            why="Each of these models needs one.",
            way_out="Write as many numbers as models, or leave it empty.",
            code="wrong_number",
        )
    ]


# ── exact order statistics of what does not fit into memory ───────────────────────────────────────────────────────────


def order_statistics(stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> Tensor:
    """The values of the given ranks (1 = smallest) in every row of fp32 pieces [n, d_k]; exact: [n, len(ranks)].

    Floats sort like their bit patterns, so one pass counts the upper 16 bits, and a second the lower 16 within the bin of each rank. Memory does not
    depend on the number of values.
    """
    upper: Tensor | None = None
    for piece in stream():
        if upper is None:
            upper = torch.zeros(piece.shape[0], _BINS, dtype=torch.int64)
        for row, values in zip(upper, piece, strict=True):
            row += torch.bincount(_keys(values) >> 16, minlength=_BINS)
    if upper is None:
        raise ValueError("There are no values to rank.")
    total = upper.cumsum(1)
    wanted = torch.tensor(ranks, dtype=torch.int64).expand(upper.shape[0], -1).contiguous()  # [n, ranks]
    bins = torch.searchsorted(total, wanted)
    rest = wanted - torch.where(bins > 0, total.gather(1, (bins - 1).clamp(min=0)), 0)
    lower = torch.zeros(*bins.shape, _BINS, dtype=torch.int64)
    for piece in stream():
        for row, values in enumerate(piece):
            keys = _keys(values)
            high = keys >> 16
            for column, chosen in enumerate(bins[row].tolist()):
                lower[row, column] += torch.bincount(keys[high == chosen] & 0xFFFF, minlength=_BINS)
    low = torch.searchsorted(lower.cumsum(2), rest.unsqueeze(2)).squeeze(2)
    return _values((bins << 16) | low)


def _keys(values: Tensor) -> Tensor:
    """fp32 -> int64 in [0, 2^32) with the same order; both zeros are one."""
    bits = (values.float() + 0.0).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def _values(keys: Tensor) -> Tensor:
    bits = torch.where(keys >= 1 << 31, keys - (1 << 31), 0xFFFFFFFF - keys)
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return bits.to(torch.int32).view(torch.float32)


def top_rank(size: int, share: float) -> int:
    """The rank above which exactly round(share * size) values lie; at least 1, so that with share 1 only the smallest is left out."""
    return max(1, size - round(share * size))


# ── what kind of weight it is ─────────────────────────────────────────────────────────────────────────────────────────


def part_of(name: str, shape: Sequence[int]) -> Literal["matrix", "embedding", "vector", "head"]:
    """The place of a weight in a model, from its name and shape: norms and biases are vectors, output layers heads."""
    if not _LAYER.search(name) and _HEAD.search(name):
        return "head"
    if _EMBEDDING.search(name):
        return "embedding"
    return "vector" if len(shape) < 2 else "matrix"


def layer_of(name: str) -> str:
    """The layer that a weight belongs to, "model.layers.3"; what stands outside of the layers is one group, ""."""
    found = _LAYER.search(name)
    return name[: found.end() - 1] if found else ""


# ── random dropping ───────────────────────────────────────────────────────────────────────────────────────────────────


def kept_mask(seed: int, name: str, size: int, drop: float) -> Tensor:
    """Which numbers of a tensor stay, each with probability 1 - drop: bool [size].

    It depends on (seed, name) alone, so neither on the rescaling nor on the order of tensors, and a higher `drop` keeps a subset.
    """
    return torch.rand(size, generator=seeded(seed, "keep", name)) >= drop


# ── weights written as text ───────────────────────────────────────────────────────────────────────────────────────────


def numbers(text: str) -> tuple[float, ...]:
    """Read "0.5, 0.3" as numbers; raises ValueError with a sentence."""
    parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
    try:
        found = tuple(float(part) for part in parts)
    except ValueError:
        raise ValueError("Numbers separated by commas are needed here.") from None
    if not all(abs(value) <= 1e6 for value in found):  # also refuses "nan" and "inf"
        raise ValueError("Every number must be an ordinary one, at most a million.")
    return found


def per_model(text: str, models: Sequence[ModelFolder], where: str, default: float) -> Tensor:
    """One number for every model, from text: empty = the default for all: fp64 [n]."""
    found = numbers(text)
    if not found:
        return torch.full((len(models),), default, dtype=torch.float64)
    if len(found) != len(models):
        raise bad_input(
            where,
            f"There are {len(found)} numbers for {len(models)} models.",
            f"One number is needed for each of: {', '.join(model.folder.name for model in models)}.",
            "Write as many numbers as models, or leave it empty.",
            "wrong_number",
        )
    return torch.tensor(found, dtype=torch.float64)


def numbers_text(text: str) -> str:
    """For a validator of a dial that holds numbers as text: the text itself, or a ValueError with a sentence."""
    numbers(text)
    return text
