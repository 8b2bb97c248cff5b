"""Training in a random subspace: every chosen weight is theta = theta_0 + s P z, where only z, and perhaps the scales s, learn.

The weights themselves stop being parameters: before each forward pass they are computed from z and put into the modules as ordinary tensors that
carry a graph back to z. One computation serves every forward pass until a backward pass has gone through it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.core.errors import EngineError, Fault, bad_input
from engine.core.facts import Facts, ModelFacts
from engine.io.models import base_of
from engine.parts.adapters import FRESH_PREFIX, fresh_tensors, load_fresh
from engine.parts.blocks import find_blocks
from engine.parts.fastfood import GENERATOR, Dense, Fastfood, Projection, power_above, project
from engine.parts.targets import target_faults, targets
from engine.train.parts import Parametrization, PartContext, Payload, seeded

EVERYTHING = "all"
OUTSIDE = "outside"
_DENSE_LIMIT = 200_000_000  # entries of a dense map: 0.8 GB
_WHOLE = "whole"  # the name under which the one map of all weights is drawn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the subspace looks, apart from which weights lie in it."""

    d: int  # all numbers that learn: z and the scales together
    scales: Literal["none", "layer", "tensor"] = "layer"  # one learned scale for each of these
    spread: Literal["tensor", "whole"] = "tensor"  # a map for each tensor, or one map over all of them
    projection: Literal["fastfood", "dense"] = "fastfood"
    dense_spread: float = 0.01
    seed: int = 17
    head: Literal["inside", "free"] = "inside"
    frozen_scales: bool = False  # hold the scales at 1, for comparisons


def blocks_for(names: Sequence[str], scales: str, model: ModelFacts) -> list[int]:
    """For every tensor the number of its scale: one a tensor, or one a layer and one for all tensors outside of the layers."""
    if scales == "none":
        return [0] * len(names)
    if scales == "tensor":
        return list(range(len(names)))
    layer = {
        name: f"{block.stack}/{block.index}"
        for block in find_blocks(model.tensors).blocks
        for module in block.modules()
        for name in module.tensors
    }
    keys = [layer.get(name, OUTSIDE) for name in names]
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [number[key] for key in keys]


def num_scales(names: Sequence[str], scales: str, model: ModelFacts) -> int:
    """How many of the d numbers are scales."""
    return 0 if scales == "none" else len(set(blocks_for(names, scales, model)))


@dataclass(kw_only=True)
class Weight:
    """One weight in the subspace, with every place in the model that reads it (tied weights have several)."""

    name: str
    base: Tensor  # theta_0
    places: list[str]  # dotted names of all places
    owners: list[tuple[nn.Module, str]]  # the modules at these places, with the last part of the name
    scale: int  # number of its scale
    requires_grad: bool
    projection: Projection | None = field(default=None, repr=False)  # its own map; None when one map serves all


class Subspace(Parametrization):
    """theta = theta_0 + s P z for the tensors called `names`, and for fresh heads when they lie inside."""

    def __init__(self, ctx: PartContext, names: Sequence[str], shape: Shape) -> None:
        self.ctx, self.names, self.shape = ctx, list(names), shape
        self.seed = shape.seed
        self.weights: list[Weight] = []
        self.z = nn.Parameter(torch.zeros(0))
        self.scales: nn.Parameter | None = None
        self._whole: Projection | None = None
        self._thetas: list[Tensor] = []
        self._versions: tuple[int, ...] = ()
        self._flag = {"spent": False}  # whether a backward pass went through the graph of `_thetas`
        self._shown: Literal["graph", "values", "nothing"] = "nothing"

    # ── putting it in and out ─────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, model: nn.Module) -> None:
        self.weights = self._chosen(model)
        for weight in self.weights:
            for module, leaf in weight.owners:
                del module._parameters[leaf]
        m = num_scales([weight.name for weight in self.weights], self.shape.scales, self.ctx.facts.model)
        if self.shape.d <= m:
            raise bad_input("methods", f"{self.shape.d:,} numbers are too few.", f"{m:,} of them are scales of layers or tensors.",
                            f"Choose more than {m:,} numbers, or no scales.", "too_small")  # fmt: skip
        device = self.weights[0].base.device
        self.z = nn.Parameter(torch.zeros(self.shape.d - m, device=device))
        self.scales = nn.Parameter(torch.ones(m, device=device)) if m else None
        self._draw(device)
        # On the model itself, so that its device and number format can still be told from its parameters.
        for name, parameter in self._learned().items():
            model.register_parameter(name.replace(".", "_"), parameter)
        bodies = {id(module): module for module in (model, base_of(model))}
        for module in bodies.values():
            module.register_forward_pre_hook(self._before_forward)
        self.sync(model)

    def _chosen(self, model: nn.Module) -> list[Weight]:
        """The weights in the order of the model, each once; the head behind the base weights when it lies inside."""
        every: dict[int, list[tuple[nn.Module, str, str]]] = {}
        tensors: dict[int, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    every.setdefault(id(parameter), []).append((module, leaf, f"{prefix}.{leaf}".strip(".")))
                    tensors[id(parameter)] = parameter
        fresh = self.ctx.task.fresh(model)
        wanted, heads = set(self.names), self.shape.head == "inside"
        base: list[tuple[int, str]] = []
        head: list[tuple[int, str]] = []
        for key, places in every.items():
            new = next((name for _, _, name in places if any(name.startswith(f"{part}.") for part in fresh)), None)
            name = next((name for _, _, name in places if name in wanted), None)
            if new is not None:
                head += [(key, new)] if heads else []
            elif name is not None:
                base.append((key, name))
            wanted -= {name for _, _, name in places}
        if wanted:
            raise EngineError(Fault(where="model.source", what=f"The loaded model has no weight called {min(wanted)}, although its files do.",
                                    why="The subspace is laid over the names in the model's files.",
                                    way_out="Use full fine-tuning for this model.", code="names_differ"), "environment")  # fmt: skip
        numbers = blocks_for([name for _, name in (*base, *head)], self.shape.scales, self.ctx.facts.model)
        return [
            Weight(name=name, base=tensors[key].detach().float(), places=[place for _, _, place in every[key]],
                   owners=[(module, leaf) for module, leaf, _ in every[key]], scale=number,
                   requires_grad=tensors[key].requires_grad)
            for (key, name), number in zip((*base, *head), numbers, strict=True)
        ]  # fmt: skip

    def _draw(self, device: torch.device) -> None:
        d = self.z.numel()
        if self.shape.spread == "whole":
            self._whole = self._map(_WHOLE, sum(weight.base.numel() for weight in self.weights), d).to(device)
            return
        for weight in self.weights:
            weight.projection = self._map(weight.name, weight.base.numel(), d).to(device)

    def _map(self, name: str, n: int, d: int) -> Projection:
        generator = seeded(self.seed, GENERATOR, name)
        if self.shape.projection == "dense":
            return Dense(n, d, generator, spread=self.shape.dense_spread)
        return Fastfood(n, d, generator)

    @property
    def maps(self) -> list[Projection]:
        """The fixed maps in use."""
        return (
            [self._whole]
            if self._whole is not None
            else [w.projection for w in self.weights if w.projection is not None]
        )

    def _learned(self) -> dict[str, nn.Parameter]:
        place = f"subspace{self.ctx.index}" if self.ctx.index > 0 else "subspace"
        return {f"{place}.z": self.z} | ({} if self.scales is None else {f"{place}.scales": self.scales})

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        learned = self._learned()
        return {name: value for name, value in learned.items() if value is self.z or not self.shape.frozen_scales}

    @torch.no_grad()
    def merge(self, model: nn.Module) -> bool:
        self._compute()
        for module in {id(item): item for item in (model, base_of(model))}.values():
            for key, hook in list(module._forward_pre_hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, Subspace) and owner.ctx is self.ctx:
                    del module._forward_pre_hooks[key]
        for weight, theta in zip(self.weights, self._thetas, strict=True):
            whole = nn.Parameter(theta.detach().clone(), requires_grad=weight.requires_grad)
            for place in weight.places:
                path, _, leaf = place.rpartition(".")
                module = model.get_submodule(path)
                module.__dict__.pop(leaf, None)
                module.register_parameter(leaf, whole)
        for name in self._learned():
            del model._parameters[name.replace(".", "_")]
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Subspace:
        """A copy of the model gets a part of its own; the maps and the starting weights never change and are shared."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.z, twin.scales = copy.deepcopy(self.z, memo), copy.deepcopy(self.scales, memo)
        twin.weights = [
            replace(weight, owners=[(copy.deepcopy(module, memo), leaf) for module, leaf in weight.owners])
            for weight in self.weights
        ]
        twin._thetas, twin._versions, twin._shown = [], (), "nothing"
        return twin

    # ── the weights follow z ──────────────────────────────────────────────────────────────────────────────────────────

    def sync(self, model: nn.Module) -> None:
        """Compute the weights anew; the graph is kept for the next forward pass, and the modules show plain values until then."""
        self._compute()
        self._show("values")

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        learning = torch.is_grad_enabled()
        if self._versions != self._now() or (learning and self._flag["spent"]):
            self._compute()
        self._show("graph" if learning else "values")

    def _now(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self._learned().values())

    def _compute(self) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._thetas = self._moved()
        flag = {"spent": False}  # the hooks hold the flag alone, so that nothing keeps the weights alive

        def spend(grad: Tensor) -> None:
            flag["spent"] = True

        for theta in self._thetas:
            theta.register_hook(spend)
        self._flag, self._versions, self._shown = flag, self._now(), "nothing"

    def _moved(self) -> list[Tensor]:
        """Every weight as theta_0 + s P z, with its graph."""
        scales = (None,) if self.scales is None else self.scales.unbind()
        if self._whole is None:
            return [
                project(self.z, weight.projection, scales[weight.scale], weight.base).view(weight.base.shape)
                for weight in self.weights
                if weight.projection is not None
            ]
        pieces = project(self.z, self._whole).split([weight.base.numel() for weight in self.weights])
        thetas = []
        for weight, piece in zip(self.weights, pieces, strict=True):
            scale = scales[weight.scale]
            moved = piece if scale is None else piece * scale
            thetas.append(weight.base + moved.view(weight.base.shape))
        return thetas

    def _show(self, what: Literal["graph", "values"]) -> None:
        if self._shown == what:
            return
        for weight, theta in zip(self.weights, self._thetas, strict=True):
            seen = theta if what == "graph" else theta.detach()
            for module, leaf in weight.owners:
                setattr(module, leaf, seen)
        self._shown = what

    # ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────

    def export(self, model: nn.Module) -> Payload:
        shape = self.shape
        fresh = self.ctx.task.fresh(model) if shape.head == "free" else ()
        tensors: dict[str, Tensor] = {"z": self.z.detach()}
        if self.scales is not None:
            tensors["scales"] = self.scales.detach()
        tensors |= {FRESH_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()}
        config = {
            "method": self.ctx.slug,
            "meaning": "theta = theta_0 + scale * P z; P is drawn from the seed and the name of each tensor",
            "generator": GENERATOR,
            "torch": torch.__version__,
            "seed": self.seed,
            "d": shape.d,
            "scales": shape.scales,
            "spread": shape.spread,
            "projection": shape.projection,
            "dense_spread": shape.dense_spread,
            "head": shape.head,
            "num_weights": len(self.weights),
            "num_moved": sum(weight.base.numel() for weight in self.weights),
            "draw": self._mark(),
            "base": self._base_hash(),
            "base_model": self.ctx.facts.model.source,
            "head_seed": self.ctx.recipe.settings.seed,
            "fresh": list(fresh),
        }
        return Payload(layout="bonsai", config=config, tensors=tensors)

    def restore(self, model: nn.Module, payload: Payload) -> None:
        config = payload.config
        self._refuse_stranger(config)
        if config["seed"] != self.seed:
            self.seed = int(config["seed"])
            self._draw(self.z.device)
        if config["draw"] != self._mark():
            raise bad_input("adapter", "The random numbers behind this file cannot be drawn again on this machine.",
                            f"It was made with torch {config['torch']}, and torch {torch.__version__} draws others from the same seed.",
                            f"Install torch {config['torch']}, or use the merged model.", "other_draw")  # fmt: skip
        with torch.no_grad():
            self.z.copy_(payload.tensors["z"])
            if self.scales is not None:
                self.scales.copy_(payload.tensors["scales"])
        if self.shape.head == "free":
            load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)
        self.sync(model)

    def _refuse_stranger(self, config: Mapping[str, Any]) -> None:
        if config.get("generator") != GENERATOR:
            raise bad_input("adapter", f"This file was made with the generator {config.get('generator')}.",
                            f"This studio draws with {GENERATOR}, which gives other numbers from the same seed.",
                            "Use the merged model, or the version of the studio that wrote the file.", "other_generator")  # fmt: skip
        mine = {"d": self.shape.d, "scales": self.shape.scales, "spread": self.shape.spread, "projection": self.shape.projection,
                "head": self.shape.head, "num_weights": len(self.weights),
                "num_moved": sum(weight.base.numel() for weight in self.weights)}  # fmt: skip
        other = next((key for key, value in mine.items() if config.get(key) != value), None)
        if other is not None:
            raise bad_input("adapter", f"This file belongs to another subspace: {other} is {config.get(other)} there and {mine[other]} here.",
                            "The numbers mean nothing in another subspace.", "Use the recipe that lies beside the file.",
                            "other_subspace")  # fmt: skip
        if config.get("base") != self._base_hash():
            raise bad_input("adapter", "This file was made for other weights than those of this model.",
                            "It holds only how far each weight moves, so the starting weights must be the same, bit for bit.",
                            f"Use the base model {config.get('base_model')} and the seed {config.get('head_seed')}.", "other_base")  # fmt: skip

    def _mark(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for item in self.maps:
            digest.update(item.mark().encode())
        return digest.hexdigest()

    def _base_hash(self) -> str:
        digest = hashlib.sha256()
        for weight in self.weights:
            digest.update(f"{weight.name}{tuple(weight.base.shape)}".encode())
            digest.update(weight.base.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def tensors_of(spec: str, model: ModelFacts) -> list[str]:
    """The base tensors that a target specification means: "all" of them, or weight and bias of the layers that it names."""
    if spec.strip() == EVERYTHING:
        return list(model.tensors)
    layers = targets(spec, model)
    return [name for name in model.tensors if name.rpartition(".")[0] in layers]


def suggested_rate(d: int) -> float:
    """A learning rate for z that makes the first step of every tensor about equally long whatever d is."""
    return float(f"{min(0.1, 0.3 / d**0.5):.2g}")


def held_bytes(shape: Shape, spec: str, facts: Facts) -> int:
    """Bytes of starting weights, moved weights, their gradients, and the vectors of the map."""
    sizes = [facts.model.size(name) for name in tensors_of(spec, facts.model)]
    if shape.projection == "dense":
        return 12 * sum(sizes) + 4 * shape.d * sum(sizes)
    lengths = [sum(sizes)] if shape.spread == "whole" else sizes
    return 12 * sum(sizes) + 12 * sum(power_above(max(n, shape.d)) for n in lengths)


def shape_faults(shape: Shape, spec: str, facts: Facts, where: str = "d") -> list[Fault]:
    """What is wrong with a subspace over these targets; `where` names the hyperparameter that holds d."""
    faults = [] if spec.strip() == EVERYTHING else target_faults(spec, facts.model)
    if faults:
        return faults
    d, names = shape.d, tensors_of(spec, facts.model)
    m, size = num_scales(names, shape.scales, facts.model), sum(facts.model.size(name) for name in names)
    if d <= m + 1:
        faults.append(
            Fault(
                where=where,
                what=f"{d:,} numbers are too few for {m:,} scales.",
                why="Each scale is one of the numbers, and directions to scale are needed too.",
                way_out=f"Choose more than {m + 1:,}, a scale for each layer instead of each tensor, or the mode 'did'.",
                code="too_small",
            )
        )
    if d > size:
        faults.append(
            Fault(
                where=where,
                what=f"{d:,} numbers are more than the {size:,} that they should move.",
                why="A subspace cannot be larger than the space.",
                way_out=f"Choose {size:,} or less; at this size full fine-tuning does the same with less work.",
                code="too_large",
            )
        )
    if shape.projection == "dense" and size * d > _DENSE_LIMIT:
        faults.append(
            Fault(
                where="projection",
                what=f"A dense map would hold {size * d:,} numbers.",
                why=f"More than {_DENSE_LIMIT:,} need gigabytes of memory and seconds a step.",
                way_out="Choose the map 'fastfood', which does the same with hardly any memory.",
                code="too_large",
            )
        )
    elif (need := held_bytes(shape, spec, facts)) > facts.machine.memory_bytes:
        faults.append(
            Fault(
                where="targets",
                what=f"The weights, their gradients and the random map need about {need / 1e9:.1f} GB.",
                why=f"{facts.machine.device_name} has {facts.machine.memory_bytes / 1e9:.1f} GB.",
                way_out="Choose fewer weights, such as attention, or a smaller model.",
                code="out_of_memory",
            )
        )
    return faults
