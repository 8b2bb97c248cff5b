"""Single entries of existing weights learn; nothing is added to the model, and everything that persists has the size of what learns.

A selector says where (tensor name -> flat places); this file does the rest. The chosen entries of a weight W live in one vector p, the only
leaf that the optimizer sees. W stays where the module expects it, but as the output of a function of p:
    forward    W, with W[places] = p already written into it: no copy, no extra memory
    backward   dp = dW[places]; the dense dW belongs to nobody and is released at once
So the gradient and the optimizer's state hold as many numbers as p. After every optimizer step `sync` writes p into W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from engine.core.errors import EngineError, Fault, bad_input
from engine.io.tensors import tensor_hash
from engine.parts.adapters import FRESH_PREFIX, fresh_tensors, load_fresh
from engine.parts.optimizers import let_decay
from engine.train.parts import Parametrization, PartContext, Payload, Remap

Weights = Mapping[str, Tensor]  # tensor name in the model -> its values, fp32, as the base has them
Places = dict[str, Tensor]  # tensor name -> flat places in it, ascending; a name without places may be left out
Selector = Callable[[Weights], Places]


class PlacedValues(torch.autograd.Function):
    """W as a function of the values at `index`: W already holds them, so forward hands out W itself and backward picks their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)  # a buffer that exists anyway; neither W nor a copy of it is kept
        return weight.detach()  # the same memory and version counter: writing W before backward raises an error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.reshape(-1).index_select(0, index).to(torch.float32), None, None  # [learning]


class SparseEntries(nn.Module):
    """The entries of one weight that differ from the base or may: `index` are their flat places, `values` [learning] those that learn now.

    Registered as the parametrization of the weight in every module that holds it. Entries that learned once and stand still again keep their
    fp32 value in `resting`, so that nothing is lost when the weight itself is stored in fewer bits.
    """

    index: Tensor
    learning: Tensor | None
    resting: Tensor | None
    active: Tensor | None

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.register_buffer("index", _narrow(index, weight.numel()).to(weight.device), persistent=False)
        for name in ("learning", "resting", "active"):
            self.register_buffer(name, None, persistent=False)
        self.values = _leaf(weight.detach().reshape(-1).index_select(0, self.index))
        self.stale = False  # whether the weight lacks resting values

    def __len__(self) -> int:
        return self.index.numel()

    def forward(self, weight: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.values.requires_grad):
            return weight
        out: Tensor = PlacedValues.apply(self.values, weight, self.places())
        return out

    def places(self) -> Tensor:
        """The flat places of what learns now, ascending."""
        return self.index if self.active is None else self.active

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The fp32 values at all of `index`, resting ones included."""
        if self.learning is None or self.resting is None:
            return self.values.detach()
        out = torch.empty(len(self), device=self.index.device)
        out[self.learning] = self.values.detach()
        out[~self.learning] = self.resting
        return out

    @torch.no_grad()
    def write(self, weight: Tensor, *, everything: bool = False) -> None:
        """Put the values into the weight, in place, so that a pending backward notices."""
        everything = everything or self.stale
        places, values = (self.index, self.whole()) if everything else (self.places(), self.values)
        weight.detach().view(-1).index_copy_(0, places.long(), values.detach().to(weight.dtype))
        self.stale = False

    @torch.no_grad()
    def keep(self, learning: Tensor | None, whole: Tensor | None = None) -> bool:
        """Let only the entries marked in `learning` (bool over `index`; None: all) learn; the others rest at their values.

        `whole` are values for all of `index`, default: as they are. Returns whether `values` became another parameter.
        """
        whole = self.whole() if whole is None else whole.to(self.values)
        same = _equal(learning, self.learning)
        self.stale = True
        if learning is None:
            chosen, self.learning, self.active, self.resting = whole, None, None, None
        else:
            self.learning = learning.to(self.index.device)
            self.active, self.resting = self.index[self.learning], whole[~self.learning].clone()
            chosen = whole[self.learning]
        if same:
            self.values.copy_(chosen)
            return False
        self.values = _leaf(chosen)
        self.values.requires_grad_(chosen.numel() > 0)
        return True

    def load(self, index: Tensor, whole: Tensor) -> None:
        """Take over saved values at the places where they were learned."""
        index = _narrow(index, int(np.prod(self.shape))).to(self.index.device)
        if not torch.equal(index, self.index):
            self.index, self.learning, self.active, self.resting = index, None, None, None
            self.values = _leaf(whole.to(index.device))
        self.keep(None, whole)

    def extra_repr(self) -> str:
        return f"{self.values.numel()} of {int(np.prod(self.shape))} entries learn"


class SparseTuning(Parametrization):
    """The entries that a selector chooses among the tensors `names` learn; all others stay bit for bit as they were.

    Subclasses add when to choose again (`narrow`) and what to say about it. Trainables are called "<tensor>.entries".
    """

    def __init__(self, ctx: PartContext, names: Iterable[str], selector: Selector) -> None:
        self.ctx, self.names, self.selector = ctx, list(names), selector
        self.entries: dict[str, SparseEntries] = {}
        self.sizes: dict[str, int] = {}  # of every tensor that could have been chosen from
        self._weights: dict[str, nn.Parameter] = {}
        self._holders: dict[str, list[tuple[nn.Module, str]]] = {}
        self._base: dict[str, str] = {}  # hash of every base tensor with entries

    # ── in the run ────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        weights = {name: self._parameter(model, name) for name in self.names}
        holders = _holders(model)
        chosen = self.selector({name: weight.detach() for name, weight in weights.items()})
        self.sizes = {name: weight.numel() for name, weight in weights.items()}
        for name, weight in weights.items():
            index = chosen.get(name)
            if index is None or not index.numel():
                continue
            weight.data = weight.data.contiguous()
            entries = SparseEntries(weight, index)
            for module, attribute in holders[id(weight)]:  # tied weights: one vector behind both
                parametrize.register_parametrization(module, attribute, entries, unsafe=True)
            self.entries[name], self._weights[name] = entries, weight
            self._holders[name], self._base[name] = holders[id(weight)], tensor_hash(weight)

    def _parameter(self, model: nn.Module, name: str) -> nn.Parameter:
        try:
            return model.get_parameter(name)
        except AttributeError:
            raise EngineError(
                Fault(
                    where="model.source",
                    what=f"The loaded model has no weight called {name}, although its files do.",
                    why="The entries that learn are chosen by the names in the model's files.",
                    way_out="Choose other layers, or full fine-tuning for this model.",
                    code="names_differ",
                ),
                "environment",
            ) from None

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {f"{name}.entries": entries.values for name, entries in self.entries.items() if entries.values.numel()}

    def sync(self, model: nn.Module) -> None:
        for name, entries in self.entries.items():
            entries.write(self._weights[name])

    def narrow(self, learning: Mapping[str, Tensor]) -> Remap:
        """From now on only entries marked in `learning` (bool over the entries of each tensor named) learn, with fresh optimizer state."""
        replaced: dict[str, nn.Parameter] = {}
        removed: list[str] = []
        for name, mask in learning.items():
            entries = self.entries[name]
            if not entries.values.numel():
                continue
            entries.keep(mask)
            if entries.values.numel():
                replaced[f"{name}.entries"] = entries.values
            else:
                removed.append(f"{name}.entries")
        return Remap(replaced=replaced, removed=tuple(removed))

    def num_learning(self) -> int:
        """How many numbers learn now."""
        return sum(entries.values.numel() for entries in self.entries.values())

    def density(self) -> dict[str, float]:
        """For every tensor that could have been chosen from: the share of it that learns now."""
        return {
            name: (self.entries[name].values.numel() if name in self.entries else 0) / size
            for name, size in self.sizes.items()
        }

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, entries in self.entries.items():
            if entries.learning is not None and entries.resting is not None:
                state[f"learning/{name}"], state[f"resting/{name}"] = entries.learning, entries.resting
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called on a freshly attached model, and again once the trainables are known: parameters that fit are kept."""
        for name, entries in self.entries.items():
            learning: Tensor | None = state.get(f"learning/{name}")
            whole = None
            if learning is not None:
                learning = learning.to(entries.index.device)
                whole = entries.whole().clone()
                whole[~learning] = state[f"resting/{name}"].to(whole)
            entries.keep(learning, whole)

    # ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def merge(self, model: nn.Module) -> bool:
        for name, entries in self.entries.items():
            weight = self._weights[name]
            for module, attribute in self._holders[name]:
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            weight.data = weight.data.float()  # a bf16 weight would round what was learned
            entries.write(weight, everything=True)
        return True

    def describe(self, name: str) -> dict[str, Any]:
        """What the exported file says about the entries of one tensor; subclasses may add to it."""
        entries = self.entries[name]
        return {"shape": list(entries.shape), "count": len(entries), "base": self._base[name]}

    def export(self, model: nn.Module) -> Payload:
        """Places and values of everything that may differ from the base, with a hash of every base tensor they belong to."""
        fresh = self.ctx.task.fresh(model)
        tensors: dict[str, Tensor] = {FRESH_PREFIX + name: t for name, t in fresh_tensors(model, fresh).items()}
        for name, entries in self.entries.items():
            tensors[f"{name}.places"] = pack_places(entries.index, self.sizes[name])
            tensors[f"{name}.values"] = entries.whole().clone()
        config = {
            "method": self.ctx.slug,
            "form": "sparse",
            "base_model": self.ctx.facts.model.source,
            "fresh": list(fresh),
            "meaning": "weight.flatten()[places] = values; places are flat indices, or a bit for each entry, highest bit first (uint8); "
            "base is the BLAKE2b-128 over type, shape and bytes of the fp32 tensor that the values belong to",
            "tensors": {name: self.describe(name) for name in self.entries},
        }
        return Payload(layout="bonsai", config=config, tensors=tensors)

    def restore(self, model: nn.Module, payload: Payload) -> None:
        said: dict[str, dict[str, Any]] = payload.config["tensors"]
        for name in [*said, *self.entries]:
            if name not in self.entries or name not in said:
                raise bad_input(
                    "adapter",
                    f"This file and this model choose different weights: {name} is in one and not in the other.",
                    "Settings or model differ from those that the file was made with.",
                    "Use the recipe that lies beside the file.",
                    "other_mask",
                )
            if said[name]["base"] != self._base[name]:
                raise bad_input(
                    "adapter",
                    f"This file belongs to another base model: the weight {name} is not the one that it was learned on.",
                    "It holds only the few numbers that changed, and they make sense in exactly that model.",
                    f"Load it onto {payload.config.get('base_model', 'the model it was made from')}, untouched.",
                    "other_base",
                )
        for name, entries in self.entries.items():
            index = unpack_places(payload.tensors[f"{name}.places"], self.sizes[name])
            values = payload.tensors[f"{name}.values"]
            if not index.numel() == values.numel() == said[name]["count"]:
                raise bad_input(
                    "adapter",
                    f"This file is damaged: it holds {index.numel():,} places and {values.numel():,} values for {name}.",
                    f"There were {said[name]['count']:,} when it was written.",
                    "Download it again, or train again.",
                    "damaged_mask",
                )
            entries.load(index, values)
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)


def pack_places(index: Tensor, size: int) -> Tensor:
    """Flat places in the smaller of two forms: as they are, or one bit for each of the `size` entries."""
    if index.numel() * index.element_size() <= (size + 7) // 8:
        return index
    mask = np.zeros(size, dtype=np.uint8)
    mask[index.cpu().numpy()] = 1
    return torch.from_numpy(np.packbits(mask))


def unpack_places(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_places`."""
    if packed.dtype != torch.uint8:
        return packed
    return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.cpu().numpy(), count=size)))


def _leaf(values: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values.detach().to(torch.float32).clone())
    let_decay(parameter)  # a vector, but of matrix entries
    return parameter


def _narrow(index: Tensor, size: int) -> Tensor:
    """Four bytes a place wherever they are enough."""
    return index.to(torch.int32 if size < 2**31 else torch.int64)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.to(other.device), other)


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For every parameter (by id): the modules that hold it, and under which name."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return found
