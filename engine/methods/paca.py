"""PaCA: a few columns of the existing weights learn; nothing is added to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.adapters import FRESH_PREFIX, PEFT_PREFIX, fresh_tensors, load_fresh, lora_config
from engine.parts.columns import ColumnLinear, columns_by_norm, draw_columns
from engine.parts.targets import (
    ALL,
    TARGETS_HELP,
    linear,
    linear_verdict,
    rank_faults,
    replace,
    target_faults,
    targets,
    top_blocks_dial,
)
from engine.train.parts import Parametrization, PartContext, Payload

Choice = Literal["random", "largest", "smallest"]


class Columns(Parametrization):
    """The columns `index` of every target layer learn; each layer draws its own, so q, k and v of one block differ."""

    spares_frozen_blocks = True

    def __init__(self, ctx: PartContext, layers: list[str], *, r: int, alpha: float, choose: Choice) -> None:
        self.ctx, self.layers, self.r, self.alpha, self.choose = ctx, layers, r, alpha, choose

    def attach(self, model: nn.Module) -> None:
        plain = {name: linear(model, name) for name in self.layers}
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        for name, module in plain.items():
            if len(owners[id(module.weight)]) > 1:
                raise ValueError(
                    f"The weight of {name} is shared with {owners[id(module.weight)]}; PaCA leaves shared weights alone."
                )
            replace(model, name, ColumnLinear(module, self._index(name, module.weight), self.alpha / self.r))

    def _index(self, name: str, weight: Tensor) -> Tensor:
        if self.choose == "random":
            return draw_columns(weight.shape[1], self.r, self.ctx.generator(f"columns/{name}"))
        return columns_by_norm(weight, self.r, largest=self.choose == "largest")

    def _layers(self, model: nn.Module) -> list[tuple[str, ColumnLinear]]:
        found = [(name, model.get_submodule(name)) for name in self.layers]
        return [(name, layer) for name, layer in found if isinstance(layer, ColumnLinear)]

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {f"{name}.columns": layer.columns for name, layer in self._layers(model)}

    def sync(self, model: nn.Module) -> None:
        for _, layer in self._layers(model):
            layer.sync()

    def merge(self, model: nn.Module) -> bool:
        for name, layer in self._layers(model):
            replace(model, name, layer.plain())
        return True

    def export(self, model: nn.Module) -> Payload:
        fresh = self.ctx.task.fresh(model)
        heads = fresh_tensors(model, fresh)
        own: dict[str, Tensor] = {FRESH_PREFIX + name: tensor for name, tensor in heads.items()}
        lora: dict[str, Tensor] = {PEFT_PREFIX + name: tensor for name, tensor in heads.items()}
        for name, layer in self._layers(model):
            columns, original = layer.effective(), layer.original.float()
            own |= {f"{name}.index": layer.index, f"{name}.columns": columns, f"{name}.original": original}
            lora |= one_hot_lora(name, layer.index, columns - original, layer.in_features)
        config = {
            "method": self.ctx.slug,
            "r": self.r,
            "alpha": self.alpha,
            "layers": self.layers,
            "base_model": self.ctx.facts.model.source,
            "fresh": list(fresh),
            "meaning": "weight[:, index] = columns; original holds the same columns of the base model",
        }
        exact = Payload(
            layout="peft",
            tensors=lora,
            config=lora_config(
                model, self.ctx.facts.model, self.layers, fresh, r=self.r, lora_alpha=self.r, lora_dropout=0.0
            ),
        )
        return Payload(layout="bonsai", config=config, tensors=own, forms={"lora": exact})

    def restore(self, model: nn.Module, payload: Payload) -> None:
        for name, layer in self._layers(model):
            layer.load(payload.tensors[f"{name}.index"], payload.tensors[f"{name}.columns"])
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)


def one_hot_lora(name: str, index: Tensor, change: Tensor, in_features: int) -> dict[str, Tensor]:
    """The same change of columns as a LoRA: A picks the columns (one-hot rows), B [out, r] holds how they changed."""
    a = torch.zeros(index.numel(), in_features, device=index.device)
    a[torch.arange(index.numel(), device=index.device), index] = 1.0
    return {f"{PEFT_PREFIX}{name}.lora_A.weight": a, f"{PEFT_PREFIX}{name}.lora_B.weight": change}


class PaCA(TrainMethod):
    """Partial connection adaptation."""

    card = Card(
        slug="paca",
        title="PaCA",
        pick_when="Pick this when you would use LoRA but want each training step to be quicker and to fit longer texts on the same machine, "
        "by editing a few randomly chosen columns of the existing weights instead of bolting on extra pieces.",
        summary="In every layer a few columns of the weights, chosen at random, may change; all others stay bit for bit as they were. Nothing is "
        "added to the model, so a step costs little more than reading it, and the result can leave as an exact LoRA.",
        paper="PaCA: Partial Connection Adaptation for Efficient Fine-Tuning",
        year=2025,
        arxiv="2503.01905",
        algorithm=(
            "For every target layer with weight W [out, in] draw r distinct columns I, each layer its own.",
            "Learn P [out, r], which starts as W[:, I] / s with s = alpha / r; the effective columns are s P, so the start equals the base model.",
            "Everything else in W, and the bias, is frozen. A layer learns out * r numbers.",
            "Forward: s P stands in W[:, I]; one matrix product, no branch.",
            "Remember for backward only x[..., I], never the whole input.",
            "Backward: dX = dY W; dP = s dY^T x[..., I]. The dense [out, in] gradient is never formed.",
            "The optimizer holds state for P alone. After each step the new columns are written into W, before anything reads it.",
            "Export: columns, their places and the original columns; or an exact LoRA of rank r whose A picks columns and B = s P - W0[:, I].",
        ),
        avoid_when="The smallest possible file matters more than speed: at the same rank LoRA's A and B are smaller on wide layers.",
        traps=(
            "s multiplies every step of the weights: changing alpha changes the learning rate. The suggested rate here takes s into account.",
            "Released code writes the columns only in some training steps, so that a measurement may see old ones. Here they follow every step.",
            "Released code overwrites the base for good. Here the original columns are kept, and the edit can be taken back.",
            "Writing W between forward and backward would falsify dX silently; here it raises an error.",
            "Memory falls only where nobody else keeps the layer's input: layers that share one input, or a norm that keeps a copy, hide the gain.",
            "GPT-2 stores its weights transposed, in a layer of its own; such models are refused.",
            "Output layers that share weights with the embedding are left out.",
            "The 4-bit form of the paper (QPaCA) is not built here.",
        ),
        figures=(
            Figure(
                claim="Training time against LoRA, similar accuracy",
                paper="-22 % (abstract)",
                ours="-14 to -22 % a step in fp32, -11 to -20 % in bf16 (CPU, four small models, as many numbers that learn)",
            ),
            Figure(
                claim="Total training memory against LoRA",
                paper="-16 % (abstract)",
                ours="-19 to -37 % of what is remembered for backward in fp32 (the same models)",
            ),
            Figure(
                claim="Final loss against LoRA with as many numbers that learn",
                paper="similar (abstract)",
                ours="2.83 against 2.82, frozen 5.08 (stories model on Shakespeare, 120 steps, mean of 3 seeds)",
            ),
            Figure(claim="Longest text that fits, against LoRA", paper="+23 % (abstract)"),
            Figure(claim="Throughput against LoRA, A100 and Gaudi 2", paper="+16 % (abstract)"),
            Figure(claim="MMLU averages for each model", paper="unconfirmed"),
        ),
        cost=Cost(time=2, memory=1, size=1),
        family="Selection",
        first_choice=True,
    )
    needs = Needs(linear_layers=True)
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {"r": 8, "alpha": 8}, "paper": {"r": 16, "alpha": 64}}

    class Params(HyperParams):
        """Hyperparameters of PaCA."""

        r: int = dial(
            16,
            label="Columns",
            unit="columns",
            low=1,
            high=16384,
            tier="basic",
            paper=16,
            help="How many columns of each layer may change: more can learn more, and each costs a little time and memory.",
        )
        alpha: float = dial(
            16.0,
            label="Strength",
            unit="1",
            low=0.01,
            high=65536,
            paper=64,
            help="Multiplies every step of the columns, divided by their number. Equal to the columns means: no change.",
        )
        targets: str = dial(ALL, label="Layers", help=TARGETS_HELP, paper=ALL)
        top_blocks: int | None = top_blocks_dial()
        choose: Choice = dial(
            "random",
            label="Which columns",
            paper="random",
            help="random, or the columns with the largest or smallest weights; the authors saw no clear gain over random.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = linear_verdict(cls.card.title, facts)
        return super().supports(facts) if verdict.ok else verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        limits = [(name, into) for name, (_, into) in targets(params.targets, facts.model, params.top_blocks).items()]
        return target_faults(params.targets, facts.model, top_blocks=params.top_blocks) + rank_faults(
            params.r, limits, noun="columns"
        )

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in targets(params.targets, facts.model, params.top_blocks))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        return sum(params.r * out for out, _ in targets(params.targets, facts.model, params.top_blocks).values())

    @classmethod
    def input_share(cls, params: Any, facts: Facts) -> float:
        """Only the inputs of the chosen columns."""
        shapes = targets(params.targets, facts.model, params.top_blocks).values()
        return len(shapes) * params.r / max(1, sum(into for _, into in shapes))

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size, scale = facts.model.num_parameters, params.alpha / params.r
        rate = 5e-3 if size < 2_000_000 else 3e-3 if size < 200_000_000 else 4e-4  # of the weights themselves
        return [
            Suggestion(
                where="settings.learning_rate",
                value=float(f"{rate / scale:.3g}"),
                reason=f"The columns of a model of {size:,} parameters take steps of {rate:g} well"
                + (
                    f"; the strength multiplies each step by {scale:g}, so the rate is divided by it."
                    if scale != 1
                    else "."
                ),
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        return [
            Columns(ctx, list(targets(p.targets, ctx.facts.model, p.top_blocks)), r=p.r, alpha=p.alpha, choose=p.choose)
        ]
