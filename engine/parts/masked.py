"""Low-rank learning that respects zeros: the pruned places of a weight stay exactly zero, during training or at the merge.

Both forms are one product y = x V^T with V = base + c * gate * (B A), all [out, in] but A [r, in] and B [out, r]:
    additive        base = W, gate = the mask (0 or 1), c = alpha / r
    multiplicative  base = 0, gate = W, c = 1
V is made anew in the backward pass, so that nothing is remembered but the input of the layer, as for LoRA:
    dX = dY V,  G = c * gate * (dY^T X),  dB = G A^T,  dA = B^T G
Where no gate holds anything back, the additive form is the product of `lowrank_product`, and neither V nor G is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.core.errors import EngineError, Fault
from engine.core.facts import ModelFacts
from engine.parts.adapters import FRESH_PREFIX, base_name, fresh_tensors, load_fresh
from engine.parts.lowrank_product import low_rank_product
from engine.parts.pruning import mask_of, pack_bits, summary, unpack_bits
from engine.parts.targets import linear, replace
from engine.train.parts import Parametrization, PartContext, Payload, Remap, StepReport

When = Literal["always", "merge"]
Kind = Literal["add", "scale"]
Start = Literal["first", "equal"]
RANK_EVERY = 10  # steps between two looks at the numerical rank


class GatedProduct(torch.autograd.Function):
    """y = x (base + c * gate * (B A))^T with gradients for x, A and B alone; the wide product is recomputed, never kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor | None, gate: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.scale, ctx.has_base, ctx.has_gate = scale, base is not None, gate is not None
        ctx.save_for_backward(x, base, gate, a, b)
        with torch.autocast(x.device.type, enabled=False):  # B A is made in full precision
            return F.linear(x, effective(base, gate, a, b, scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, gate, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # [n, out]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = (flat @ effective(base, gate, a, b, ctx.scale).to(flat.dtype)).view(x.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dense = (flat.t() @ x.reshape(-1, x.shape[-1])).to(a.dtype)  # [out, in], alive for these lines only
            if gate is not None:
                dense.mul_(gate)
            da, db = (b * ctx.scale).t() @ dense, dense @ (a * ctx.scale).t()
        return dx, None, None, da, db, None


def effective(base: Tensor | None, gate: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """base + scale * gate * (B A), fp32 [out, in]; without a gate every place learns."""
    product = (b * scale) @ a  # the strength is multiplied into the thin matrix: wide passes are what costs
    if gate is not None:
        product.mul_(gate)
    return product if base is None else product.add_(base)


class MaskedLinear(nn.Linear):
    """A linear layer W with thin matrices A [r, in] and B [out, r] that only reach the places of an explicit mask [out, in].

    kind "add": W + c * M * (B A); with `when` = "merge" the mask is left out while training and applied in eval mode and at the merge.
    kind "scale": W * (B A). A mask of None means that every place may learn (a layer that was not pruned).
    """

    mask: Tensor | None

    def __init__(
        self, plain: nn.Linear, mask: Tensor | None, a: Tensor, b: Tensor, *,
        kind: Kind, scale: float, when: When,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.weight.requires_grad_(False)
        self.kind, self.scale, self.when = kind, scale, when
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("mask", None, persistent=False)
        self.hold_to(mask)
        self.train(plain.training)

    def hold_to(self, mask: Tensor | None) -> None:
        """Let only the places of this mask learn; one that holds nothing back is kept for the record and costs nothing."""
        self.mask, self.free = mask, mask is None or bool(mask.all())

    def _product(self, *, masked: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.kind == "scale":
            return None, self.weight
        return self.weight, self.mask if masked and not self.free else None

    def forward(self, x: Tensor) -> Tensor:
        base, gate = self._product(masked=self.when == "always" or not self.training)
        if base is not None and gate is None:  # nothing is held back: W + c B A need not be made at all
            return low_rank_product(x, base, self.bias, self.lora_A, self.lora_B, self.scale)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out: Tensor = GatedProduct.apply(x, base, gate, self.lora_A, self.lora_B, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight that the layer stands for, fp32, with exact zeros at the pruned places."""
        base, gate = self._product(masked=True)
        out = effective(base, gate, self.lora_A, self.lora_B, self.scale)
        return out if self.mask is None else torch.where(self.mask, out, 0.0)

    def plain(self) -> nn.Linear:
        """The same layer as an nn.Linear with the learned part folded in."""
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        out.weight, out.bias = nn.Parameter(self.merged(), requires_grad=False), self.bias
        return out.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}, kind={self.kind}, when={self.when}"


def start_factors(
    module: nn.Linear, r: int, kind: Kind, generator: torch.Generator, *, start: Start = "first", noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with B A = 0 for the additive form and B A = 1 for the multiplicative one (nearly, with noise)."""
    out, into = module.out_features, module.in_features
    a = (torch.rand(r, into, generator=generator) * 2 - 1) / math.sqrt(into)  # Kaiming
    b = torch.zeros(out, r)
    if (
        kind == "scale" and start == "first"
    ):  # one component carries the ones, the others start at nothing and come apart
        a[0], b[:, 0] = 1.0, 1.0
    elif kind == "scale":
        level = 1.0 / math.sqrt(r)
        a = level * (1.0 + noise * torch.randn(r, into, generator=generator))
        b = level * (1.0 + noise * torch.randn(out, r, generator=generator))
    return a.to(module.weight.device), b.to(module.weight.device)


class MaskedTuning(Parametrization):
    """Sparsity-safe low-rank learning on named layers; `dense` names layers that were not pruned and learn everywhere."""

    spares_frozen_blocks = True

    def __init__(
        self, ctx: PartContext, layers: list[str], *, r: int, kind: Kind, scale: float,
        when: When = "always", start: Start = "first", noise: float = 0.0, dense: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.ctx, self.layers, self.dense = ctx, layers, dense
        self.r, self.kind, self.scale, self.when, self.start, self.noise = r, kind, scale, when, start, noise
        self._live: list[tuple[str, MaskedLinear]] = []

    def attach(self, model: nn.Module) -> None:
        plain = {name: linear(model, name) for name in (*self.layers, *self.dense)}
        masks = mask_of(model, self.ctx.facts.model.path, self.layers)
        for name, module in plain.items():
            kind: Kind = "add" if name in self.dense else self.kind
            a, b = start_factors(
                module, self.r, kind, self.ctx.generator(f"masked/{name}"), start=self.start, noise=self.noise
            )
            mask = masks.get(name)
            replace(model, name, MaskedLinear(module, mask, a, b, kind=kind, scale=self.scale, when=self.when))
        self._live = self._masked(model)

    def _masked(self, model: nn.Module) -> list[tuple[str, MaskedLinear]]:
        found = [(name, model.get_submodule(name)) for name in (*self.layers, *self.dense)]
        return [(name, layer) for name, layer in found if isinstance(layer, MaskedLinear)]

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._masked(model):
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
        return found

    def adapt(self, report: StepReport) -> Remap | None:
        """Say, now and then, how many directions are really in use; nothing is changed."""
        if self.kind == "scale" and self._live and (report.step == 1 or report.step % RANK_EVERY == 0):
            report.extra["numerical_rank"] = numerical_rank(self._live[0][1])
        return None

    def merge(self, model: nn.Module) -> bool:
        for name, layer in self._masked(model):
            replace(model, name, layer.plain())
        return True

    def export(self, model: nn.Module) -> Payload:
        fresh = self.ctx.task.fresh(model)
        tensors: dict[str, Tensor] = {
            FRESH_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()
        }
        layers = self._masked(model)
        masks = {name: layer.mask for name, layer in layers if layer.mask is not None}
        for name, layer in layers:
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = layer.lora_A.detach(), layer.lora_B.detach()
            if layer.mask is not None:
                tensors[f"{name}.mask"] = pack_bits(layer.mask)
        meaning = (
            "weight * (B @ A)" if self.kind == "scale" else "weight + scale * mask * (B @ A)"
        ) + "; mask: bits, 1 = kept, first bit highest"
        config: dict[str, Any] = {
            "method": self.ctx.slug, "r": self.r, "scale": self.scale, "when": self.when, "layers": self.layers,
            "dense_layers": list(self.dense), "base_model": base_name(self.ctx.facts.model), "fresh": list(fresh),
            "meaning": meaning, "density": round(summary(masks)["density"], 6),
        }  # fmt: skip
        if self.kind == "scale":
            config["numerical_rank"] = {name: numerical_rank(layer) for name, layer in layers if name in self.layers}
        return Payload(layout="bonsai", config=config, tensors=tensors)

    @torch.no_grad()
    def restore(self, model: nn.Module, payload: Payload) -> None:
        for name, layer in self._masked(model):
            layer.lora_A.copy_(payload.tensors[f"{name}.lora_A"])
            layer.lora_B.copy_(payload.tensors[f"{name}.lora_B"])
            if layer.mask is not None:
                mask = unpack_bits(payload.tensors[f"{name}.mask"], layer.weight.shape).to(layer.mask.device)
                if bool((layer.weight[~mask] != 0).any()):
                    raise EngineError(
                        Fault(
                            where="adapter", what=f"This file belongs to another pruning: {name} keeps weights that the file calls removed.",
                            why="The mask of the file and the zeros of the model differ.",
                            way_out="Use the pruned model that the file was made with.", code="other_mask",
                        )
                    )  # fmt: skip
                layer.hold_to(mask)
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)


@torch.no_grad()
def numerical_rank(layer: MaskedLinear, *, relative: float = 1e-4) -> int:
    """How many singular values of B A are above `relative` times the largest, from two thin QR factors."""
    across = torch.linalg.qr(layer.lora_B.double()).R @ torch.linalg.qr(layer.lora_A.double().T).R.T  # [r, r]
    values = torch.linalg.svdvals(across)
    return int((values > relative * values.max()).sum())


def output_layer(model: ModelFacts) -> str | None:
    """The module name of an output layer over the vocabulary with weights of its own; None where it shares the word table's."""
    tables = [
        name for name, shape in model.tensors.items()
        if len(shape) == 2 and shape[0] == model.vocab_size and "position" not in name
        and name.removesuffix(".weight") not in model.linears
    ]  # fmt: skip
    return tables[-1].removesuffix(".weight") if len(tables) > 1 else None  # the word table itself comes first


def head_faults(model: ModelFacts, where: str = "head") -> list[Fault]:
    """A fault where the output layer cannot learn on its own."""
    if output_layer(model) is not None:
        return []
    tied = model.tied_embeddings
    return [
        Fault(
            where=where, what="The output layer cannot learn here.",
            why="It shares its weights with the word table, which must not change."
            if tied else "This model has no output layer over its vocabulary.",
            way_out="Switch it off; the layers inside still learn.", code="no_head",
        )
    ]  # fmt: skip


def num_masked(layers: Mapping[str, tuple[int, int]], r: int) -> int:
    """How many numbers the thin matrices of these layers hold."""
    return sum(r * (out + into) for out, into in layers.values())
