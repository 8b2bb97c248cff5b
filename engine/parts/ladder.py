"""A ladder side network: a narrow transformer beside a frozen one, fed by a rung from every layer of the frozen one.

The frozen body runs without autograd and in eval mode; what its layers were called with and what they answered is heard by hooks that live for one
call. Then the side network runs with autograd and its answer goes into the body's last state, so heads, losses, masks, packing and generation work as
they do without it.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Gate = Literal["learnable", "none"]
Output = Literal["add", "side", "gate"]
NAME = "ladder"


@dataclass
class Call:
    """How one layer of the body was called, and what it answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor  # [B, T, d]


@dataclass
class Heard:
    """Everything that the side network needs to know about one pass of the body."""

    start: Tensor | None = None  # [B, T, d], what the first layer reads
    calls: dict[int, Call] = field(default_factory=dict)


class Ladder(nn.Module):
    """Downsamplers, gates, narrow blocks, norm and up-projection. `kept` are the layers of the body that have a rung."""

    rotary: Tensor

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        *,
        kept: Sequence[int],
        num_layers: int,
        hidden: int,
        narrow: int,
        rotary: Tensor,  # [layers with a rung, head_dim / k]
        rungs: bool,
        gate: Gate,
        temperature: float,
        alpha: float,
        output: Output,
        dropout: float,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.kept, self.num_layers, self.gate, self.output = tuple(kept), num_layers, gate, output
        self.temperature = temperature
        self.first = nn.Linear(hidden, narrow, bias=bias)
        self.rungs = nn.ModuleList(nn.Linear(hidden, narrow, bias=bias) for _ in kept if rungs)
        self.alpha = nn.Parameter(torch.full((len(kept),), alpha)) if rungs and gate == "learnable" else None
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.dropout = norm, nn.Dropout(dropout)
        self.up = nn.Linear(narrow, hidden, bias=bias)
        self.last = nn.Parameter(torch.tensor(alpha)) if output == "gate" else None
        self.register_buffer("rotary", rotary)
        for place, block in enumerate(blocks):  # in a cache the narrow layers stand behind those of the body
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    object.__setattr__(module, "layer_idx", num_layers + place)

    def mu(self) -> Tensor:
        """The gates [layers with a rung]: how much of the side network's own state goes on, against what the rung brings."""
        assert self.alpha is not None
        return torch.sigmoid(self.alpha / self.temperature)

    def forward(self, heard: Heard, last_state: Tensor) -> Tensor:
        """The new last state [B, T, d]."""
        if self.rungs:
            assert heard.start is not None
            s = self.first(self._read(heard.start))  # [B, T, d / k]
        else:
            s = self.first(self._read(heard.calls[self.num_layers - 1].output))
        gates = self.mu() if self.alpha is not None else None
        _make_room(heard.calls[self.kept[0]].kwargs.get("past_key_values"), self.kept, self.num_layers, s.shape[1])
        for place, (layer, block) in enumerate(zip(self.kept, self.blocks, strict=True)):
            call = heard.calls[layer]
            if self.rungs:
                seen = self.rungs[place](self._read(call.output))
                s = s + seen if gates is None else gates[place] * s + (1 - gates[place]) * seen
            s = block(s, *self._rest(call, s), **self._named(call, place, s))
            s = s[0] if isinstance(s, tuple) else s
        out = self.up(self.dropout(self.norm(s)))  # [B, T, d]
        if self.output == "add":
            out = last_state + out
        elif self.last is not None:
            mix = torch.sigmoid(self.last / self.temperature)
            out = mix * out + (1 - mix) * last_state
        return out.to(last_state.dtype)

    def _read(self, state: Tensor) -> Tensor:
        """A state of the body, cut off from whatever made it; outside of autocast in the precision of the side network."""
        state = state.detach()
        return state if torch.is_autocast_enabled(state.device.type) else state.to(self.first.weight.dtype)

    def _rest(self, call: Call, s: Tensor) -> list[Any]:
        return [_mask(value, s) for value in call.args[1:]]

    def _named(self, call: Call, place: int, s: Tensor) -> dict[str, Any]:
        """The keyword arguments of the body's layer, with cosines and sines cut down to the places that the narrow heads kept."""
        named = {key: value for key, value in call.kwargs.items() if key != "hidden_states"}
        named = {key: _mask(value, s) if "mask" in key else value for key, value in named.items()}
        if "position_embeddings" in named:
            named["position_embeddings"] = tuple(
                table[..., self.rotary[place]].to(s.dtype) for table in named["position_embeddings"]
            )
        return named


def attach_ladder(body: nn.Module, layers: Sequence[nn.Module], ladder: Ladder) -> None:
    """Put a ladder beside `body`, whose layers are `layers`: `body.forward` answers with the ladder's last state from now on."""
    setattr(body, NAME, ladder)
    object.__setattr__(body, "ladder_layers", tuple(_path(body, layer) for layer in layers))
    body.forward = types.MethodType(_forward, body)  # a bound method: copies of the model keep working
    body.train = types.MethodType(_train, body)  # type: ignore[method-assign]
    body.train(body.training)


def ladder_of(body: nn.Module) -> Ladder:
    """The ladder beside a body."""
    found = getattr(body, NAME)
    assert isinstance(found, Ladder)
    return found


def _train(body: nn.Module, mode: bool = True) -> nn.Module:
    """The body stays in eval mode: its dropout would be noise that the side network can do nothing about."""
    nn.Module.train(body, False)
    ladder_of(body).train(mode)
    return body


def _forward(body: nn.Module, *args: Any, **kwargs: Any) -> Any:
    wants_tuple = kwargs.pop("return_dict", None) is False
    heard = Heard()
    with torch.no_grad(), _listening(body, heard):
        out = type(body).forward(body, *args, **kwargs, return_dict=True)
    out["last_hidden_state"] = last = ladder_of(body)(heard, out["last_hidden_state"].detach())
    pooler = getattr(body, "pooler", None)
    if pooler is not None:
        out["pooler_output"] = pooler(last)
    return out.to_tuple() if wants_tuple else out


@contextlib.contextmanager
def _listening(body: Any, heard: Heard) -> Iterator[None]:
    """Hooks on the layers that have a rung, and on the first and the last, for the time of one call."""
    ladder, names = ladder_of(body), body.ladder_layers
    wanted = {*ladder.kept, 0, len(names) - 1}
    handles = [
        body.get_submodule(name).register_forward_hook(_hear(heard, place, place in ladder.kept), with_kwargs=True)
        for place, name in enumerate(names)
        if place in wanted
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hear(heard: Heard, place: int, kept: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if place == 0:
            heard.start = args[0] if args else kwargs["hidden_states"]
        output = output[0] if isinstance(output, tuple) else output
        heard.calls[place] = Call(args if kept else (), kwargs if kept else {}, output)

    return hook


def _path(body: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in body.named_modules() if module is layer)


def _mask(value: Any, s: Tensor) -> Any:
    """Additive masks of a half-precision body, for a side network that computes in full precision."""
    narrow = isinstance(value, Tensor) and value.dim() == 4 and value.dtype in {torch.bfloat16, torch.float16}
    return value.to(s.dtype) if narrow else value


def _make_room(cache: Any, kept: Sequence[int], num_layers: int, new: int) -> None:
    """Give a key-value cache a layer for every narrow block, of the same kind as the layer of the body that it stands beside.

    They live in the body's own cache, behind its layers, so that everything that happens to a cache (reordering by beam search, cropping, repeating)
    happens to both. A cache that was filled without the side network is refused: the narrow blocks would have no past.
    """
    if cache is None:
        return
    if getattr(cache, "layer_class_to_replicate", None) is None:
        for place, layer in enumerate(kept):
            if len(cache.layers) <= num_layers + place:
                cache.layers.append(_empty_twin(cache.layers[layer]))
    past = int(cache.get_seq_length(0)) - new  # the body has put the new places in already
    own = int(cache.layers[num_layers].get_seq_length()) if len(cache.layers) > num_layers else 0
    if own != past:
        raise ValueError(
            f"The cache holds {past} places of the model and {own} of its side network; it was filled without the side network, or by another one."
        )


def _empty_twin(layer: Any) -> Any:
    twin = copy.copy(layer)
    twin.keys = twin.values = None
    twin.is_initialized = False
    for name in ("cumulative_length", "cumulative_length_int"):
        count = getattr(twin, name, None)
        if count is not None:
            setattr(twin, name, torch.zeros_like(count) if isinstance(count, Tensor) else 0)
    return twin
