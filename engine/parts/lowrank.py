"""Low-rank additions to linear layers, W + s B A, through peft's own layers, so that every file is one that peft reads."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.parts.adapters import PEFT_PREFIX, fresh_tensors, load_fresh, lora_config
from engine.parts.targets import linear, replace
from engine.train.parts import Parametrization, PartContext, Payload

Init = Literal["default", "gaussian", "pissa", "olora"]
FROM_WEIGHTS = frozenset({"pissa", "olora"})  # they start from a part of W and take it out of the base


class LowRank(Parametrization):
    """Matrices A [r, in] and B [out, r] beside each target layer, and with DoRA a magnitude [out]."""

    spares_frozen_blocks = True

    def __init__(
        self,
        ctx: PartContext,
        layers: list[str],
        *,
        r: int,
        alpha: float,
        dropout: float,
        init: Init,
        use_dora: bool,
        use_rslora: bool,
    ) -> None:
        self.ctx, self.layers, self.r, self.init, self.use_dora = ctx, layers, r, init, use_dora
        self.scale = alpha / (math.sqrt(r) if use_rslora else r)
        self.settings: dict[str, Any] = {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "use_dora": use_dora,
            "use_rslora": use_rslora,
        }
        self.adapter = f"adapter{max(ctx.index, 0)}"
        self.start: dict[str, tuple[Tensor, Tensor]] = {}  # A0, B0 where the base was changed

    def attach(self, model: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        from engine.parts.lora_layer import quicken

        for name in self.layers:
            linear(model, name)
        config = LoraConfig(
            target_modules=list(self.layers),
            bias="none",
            **self.settings,
            init_lora_weights=True if self.init == "default" else self.init,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.ctx.generator("lowrank").initial_seed())
            inject_adapter_in_model(config, model, adapter_name=self.adapter)
        del model.peft_config  # the run keeps its own books; peft would take this model for one of its own
        found = {
            name
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and self.adapter in module.lora_A
        }
        if found != set(self.layers):
            raise ValueError(f"peft attached to other layers than asked: {sorted(found ^ set(self.layers))[:4]}")
        for module in model.modules():
            if isinstance(module, LoraLayer):  # injecting a second adapter silences the first one; wake all
                module.set_adapter(list(module.lora_A))
                quicken(module)
        if self.init in FROM_WEIGHTS:
            self.start = {
                name: (self._a(model, name).detach().clone(), self._b(model, name).detach().clone())
                for name in self.layers
            }

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name in self.layers:
            found[f"{name}.lora_A"] = self._a(model, name)
            found[f"{name}.lora_B"] = self._b(model, name)
            if self.use_dora:
                found[f"{name}.lora_magnitude"] = self._magnitude(model, name)
        return found

    def export(self, model: nn.Module) -> Payload:
        fresh = self.ctx.task.fresh(model)
        tensors: dict[str, Tensor] = {}
        for name in self.layers:
            a, b = self._a(model, name).detach(), self._b(model, name).detach()
            if (
                name in self.start
            ):  # W_res + s B A = W + s [B, -B0] [A; A0]: exact on the untouched base, at twice the rank
                a0, b0 = (start.to(a) for start in self.start[name])
                a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = a, b
            if self.use_dora:
                tensors[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"] = self._magnitude(model, name).detach()
        settings = dict(self.settings)
        if self.start:
            settings.update(r=2 * self.r, lora_alpha=2 * self.r * self.scale, use_rslora=False)
        tensors.update({PEFT_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()})
        config = lora_config(model, self.ctx.facts.model, self.layers, fresh, **settings)
        return Payload(layout="peft", config=config, tensors=tensors)

    @torch.no_grad()
    def restore(self, model: nn.Module, payload: Payload) -> None:
        for name in self.layers:
            a = payload.tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"]
            b = payload.tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"]
            if (
                name in self.start
            ):  # the file is about the untouched base: take out what it took out, not what this machine did
                weight = _layer(model, name).get_base_layer().weight
                mine_a, mine_b = self.start[name]
                a, a0 = (part.to(mine_a) for part in a.split(self.r))
                b, b0 = (part.to(mine_b) for part in b.split(self.r, dim=1))
                b0 = -b0
                weight += (self.scale * (mine_b @ mine_a - b0 @ a0)).to(weight)
                self.start[name] = a0, b0
            self._a(model, name).copy_(a)
            self._b(model, name).copy_(b)
            if self.use_dora:
                self._magnitude(model, name).copy_(payload.tensors[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"])
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), PEFT_PREFIX)

    def merge(self, model: nn.Module) -> bool:
        for name in self.layers:
            layer = _layer(model, name)
            base = layer.get_base_layer()
            base.weight.data = base.weight.data.float()  # a bf16 base would round the sum
            layer.merge(safe_merge=True, adapter_names=[self.adapter])
            replace(model, name, base)
        return True

    def _a(self, model: nn.Module, name: str) -> nn.Parameter:
        return _weight(_layer(model, name).lora_A[self.adapter])

    def _b(self, model: nn.Module, name: str) -> nn.Parameter:
        return _weight(_layer(model, name).lora_B[self.adapter])

    def _magnitude(self, model: nn.Module, name: str) -> nn.Parameter:
        return _weight(_layer(model, name).lora_magnitude_vector[self.adapter])


def _layer(model: nn.Module, name: str) -> Any:
    """The peft layer called `name`; peft ships no types."""
    return model.get_submodule(name)


def _weight(holder: Any) -> nn.Parameter:
    weight: nn.Parameter = holder.weight
    return weight
