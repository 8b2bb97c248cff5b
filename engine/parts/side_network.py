"""The ladder side network as a parametrization: how it starts, what learns, how it is taken home."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.errors import EngineError, Fault
from engine.core.facts import ModelFacts
from engine.io.models import base_of, load_config
from engine.parts.adapters import FRESH_PREFIX, fresh_tensors, load_fresh
from engine.parts.blocks import Block, blocks_of
from engine.parts.ladder import NAME, Ladder, attach_ladder, ladder_of
from engine.parts.ladder_start import (
    Anatomy,
    Scores,
    anatomy,
    copy_kept,
    draw,
    even_places,
    fisher_scores,
    keep_block,
    keep_residual,
    weight_scores,
)
from engine.train.parts import Parametrization, PartContext, Payload

Init = Literal["fisher", "weight", "random"]
PATTERNS = {"all": (1, 0), "3-of-4": (4, 1), "every-2nd": (2, 1)}  # of every n layers, the first ones left out
USUAL = 8


class SideNetwork(Parametrization):
    """The ladder beside a frozen model: cut out of it or drawn at random, trained, and taken home without it."""

    spares_frozen_blocks = True

    def __init__(self, ctx: PartContext, params: Any) -> None:
        self.ctx, self.params = ctx, params
        self.k: int = params.k or usual_k(anatomy_of(ctx.facts.model))
        self.scores: Scores | None = None
        self.ladder: Ladder | None = None
        self.watched = False

    # ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Which weights the task pulls at: squared gradients of single examples, summed."""
        if self.params.init == "fisher":
            self.scores = fisher_scores(model, _matrices(base_of(model)), self._losses(model, batches))

    def _losses(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Callable[[], Tensor]]:
        device, left = next(model.parameters()).device, self.params.samples
        for batch in batches:
            for row in range(batch["input_ids"].shape[0]):
                if left == 0:
                    return
                left -= 1
                example = {key: value[row : row + 1].to(device) for key, value in batch.items() if value.dim()}
                yield functools.partial(self._loss, model, example)

    def _loss(self, model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
        logits, labels = self.ctx.task.forward_logits(model, example)
        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    def attach(self, model: nn.Module) -> None:
        p, k, body = self.params, self.k, base_of(model)
        config: Any = body.config
        wide, layout = anatomy(config), blocks_of(body)
        modules = [body.get_submodule(_path(block)) for block in layout.blocks]
        kept = kept_layers(p.layers, len(modules))
        scores = self.scores or weight_scores(_matrices(body))
        self.scores = None
        residual = keep_residual(scores.columns[_embedding(body)], wide, k)
        generator = self.ctx.generator("ladder")
        narrow_config = narrowed(config, wide.narrowed(k))
        narrow, places = [], []
        with torch.random.fork_rng(devices=[]):
            for layer in kept:
                block = type(modules[layer])(narrow_config, layer_idx=layer)
                if p.init == "random":
                    draw(block, float(getattr(config, "initializer_range", 0.02) or 0.02), generator)
                    places.append(even_places(wide, k))
                else:
                    chosen = keep_block(layout.blocks[layer], scores, residual, wide, k)
                    copy_kept(modules[layer], block, layout.blocks[layer], chosen, wide)
                    places.append(chosen.rotary)
                narrow.append(block)
            ladder = Ladder(
                narrow,
                _norm(body, residual, cut=p.init != "random"),
                kept=kept,
                num_layers=len(modules),
                hidden=wide.hidden,
                narrow=wide.hidden // k,
                rotary=torch.stack(places),
                rungs=p.ladders == "all",
                gate=p.gate,
                temperature=p.temperature,
                alpha=p.alpha,
                output=p.output,
                dropout=p.dropout,
                bias=p.bias,
            )
        self._start_samplers(ladder, residual, generator)
        ladder.to(next(body.parameters()).device)
        attach_ladder(body, modules, ladder)
        self.ladder = ladder

    @torch.no_grad()
    def _start_samplers(self, ladder: Ladder, residual: Tensor, generator: torch.Generator) -> None:
        """Down: pick the kept dimensions, so that a cut network finds its own coordinates, or random. Up: nothing, or the way back."""
        pick = self.params.samplers == "pick"
        for layer in (ladder.first, *ladder.rungs, ladder.up):
            assert isinstance(layer, nn.Linear)
            edge = layer.in_features**-0.5
            for parameter in layer.parameters():
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * edge)
            empty = layer is ladder.up and self.params.output == "add"
            if pick or empty:
                for parameter in layer.parameters():
                    parameter.zero_()
            if pick and not empty:
                weight, narrow = layer.weight, torch.arange(residual.numel())
                if layer is ladder.up:
                    weight[residual, narrow] = 1.0
                else:
                    weight[narrow, residual] = 1.0

    # ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {f"{NAME}.{name}": parameter for name, parameter in ladder_of(base_of(model)).named_parameters()}

    def heard_blocks(self, model: nn.Module) -> Iterable[int]:
        ladder = ladder_of(base_of(model))
        return (*ladder.kept, ladder.num_layers - 1)

    def sync(self, model: nn.Module) -> None:
        """Once, when it is known what learns: nothing inside the frozen body may, because no gradient would ever reach it."""
        if self.watched:
            return
        self.watched = True
        body = base_of(model)
        fresh = {
            id(p) for name in self.ctx.task.fresh(model) for p in model.get_submodule(name).parameters()
        }  # a new pooler stands behind the last state and is reached
        stray = [
            name
            for name, parameter in body.named_parameters()
            if parameter.requires_grad and not name.startswith(f"{NAME}.") and id(parameter) not in fresh
        ]
        if stray:
            raise EngineError(
                Fault(
                    where="methods",
                    code="no_gradient",
                    what=f"{stray[0]} is meant to learn inside a model that a side network only listens to.",
                    why="Nothing flows back through the model, so it would never move.",
                    way_out="Remove the other method, or the side network.",
                )
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ladder is None else {"rotary": self.ladder.rotary}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self.ladder is not None
        self.ladder.rotary.copy_(state["rotary"])

    # ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────

    def export(self, model: nn.Module) -> Payload:
        ladder, fresh = ladder_of(base_of(model)), self.ctx.task.fresh(model)
        tensors = {f"{NAME}.{name}": parameter.detach() for name, parameter in ladder.named_parameters()}
        tensors |= {FRESH_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()}
        config = {
            "method": self.ctx.slug,
            "k": self.k,
            "layers": list(ladder.kept),
            "base_model": self.ctx.facts.model.source,
            "fresh": list(fresh),
            "meaning": "a side network; it answers together with the untouched base model",
        }
        return Payload(layout="bonsai", config=config, tensors={**tensors, "rotary": ladder.rotary})

    @torch.no_grad()
    def restore(self, model: nn.Module, payload: Payload) -> None:
        ladder = ladder_of(base_of(model))
        for name, parameter in ladder.named_parameters():
            parameter.copy_(payload.tensors[f"{NAME}.{name}"])
        ladder.rotary.copy_(payload.tensors["rotary"])
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)


def narrowed(config: Any, small: Anatomy) -> Any:
    """The configuration of a narrow block: every width smaller, all else as it is."""
    found = copy.deepcopy(config)
    found.hidden_size, found.intermediate_size = small.hidden, small.inner
    if small.rotary:
        found.head_dim = small.head_dim
    return found


def kept_layers(spec: str, num_layers: int) -> list[int]:
    """The layers that get a rung, counted from 0. Words: all, 3-of-4, every-2nd; or numbers."""
    if spec in PATTERNS:
        every, first = PATTERNS[spec]
        return [layer for layer in range(num_layers) if layer % every >= first]
    return sorted({int(item) for item in re.split(r"[,\s]+", spec) if item.isdecimal()})


def anatomy_of(model: ModelFacts) -> Anatomy:
    """The sizes of a model's blocks, from its configuration file."""
    return anatomy(load_config(Path(model.path)))


def usual_k(wide: Anatomy) -> int:
    """The paper's 8, or the largest below it that fits."""
    return max(wide.legal(USUAL), default=1)


def _path(block: Block) -> str:
    module = block.modules()[0]
    return module.name.removesuffix(f".{module.place}")


def _embedding(body: Any) -> str:
    weight = body.get_input_embeddings().weight
    return next(name for name, parameter in body.named_parameters() if parameter is weight)


def _matrices(body: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of all blocks and the embedding, by their names in the body."""
    parameters = dict(body.named_parameters())
    names = [
        name
        for block in blocks_of(body).blocks
        for module in block.modules()
        for name in module.tensors
        if parameters[name].dim() == 2
    ]
    return {name: parameters[name] for name in (_embedding(body), *names)}


def _norm(body: Any, residual: Tensor, *, cut: bool) -> nn.Module:
    """The last norm of the body, narrow; bodies that norm after every layer have none, and the side network gets a new one."""
    if not hasattr(body, "norm"):
        return nn.LayerNorm(residual.numel(), eps=float(body.config.layer_norm_eps))
    norm: nn.Module = copy.deepcopy(body.norm)
    weight = body.norm.weight.detach()[residual.to(body.norm.weight.device)].float()
    norm.weight = nn.Parameter(weight if cut else torch.ones_like(weight))
    return norm
