"""What learns in a run: fp32 parameters by stable names, and the optimizer's state by the same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.train.clock import Clock
from engine.train.parts import Parametrization, Remap, Schedule


class Trainables:
    """An ordered mapping from stable names to the parameters that learn."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        seen: dict[int, str] = {}
        for name, parameter in parameters.items():
            if id(parameter) in seen:
                raise ValueError(f"'{name}' and '{seen[id(parameter)]}' are one parameter; a parameter learns once.")
            seen[id(parameter)] = name
        self._parameters = dict(parameters)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._parameters.values())

    def __len__(self) -> int:
        return len(self._parameters)

    def items(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._parameters.items())

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def num_elements(self) -> int:
        return sum(parameter.numel() for parameter in self)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in place; names and shapes must agree exactly."""
        if tensors.keys() != self._parameters.keys():
            raise ValueError(
                f"The saved parameters differ from these: {sorted(tensors.keys() ^ self._parameters.keys())[:4]}"
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter.shape != tensors[name].shape:
                    raise ValueError(
                        f"'{name}' was saved with shape {tuple(tensors[name].shape)} and is {tuple(parameter.shape)} now."
                    )
                parameter.copy_(tensors[name])

    def arrange(self, names: Sequence[str]) -> None:
        """Take the saved order: norms over all gradients are sums, and sums depend on the order in their last bit."""
        if set(names) != self._parameters.keys():
            raise ValueError(
                f"The saved parameters differ from these: {sorted(set(names) ^ self._parameters.keys())[:4]}"
            )
        self._parameters = {name: self._parameters[name] for name in names}

    def apply(self, remap: Remap) -> None:
        """Replace, add and remove parameters as a Remap says."""
        for name in remap.removed:
            self._parameters.pop(name, None)
        self._parameters.update(remap.replaced)


def collect(model: nn.Module, parametrizations: list[Parametrization], fresh: tuple[str, ...]) -> Trainables:
    """Ask every parametrization what learns, add fresh modules, freeze the rest, and keep what learns in fp32."""
    found: dict[str, nn.Parameter] = {}
    for part in parametrizations:
        mine = part.trainables(model)
        clash = found.keys() & mine.keys()
        if clash:
            raise ValueError(f"Two parametrizations use the name '{min(clash)}'.")
        found.update(mine)
    held = {id(parameter) for parameter in found.values()}
    for name, parameter in model.named_parameters():
        if any(name == module or name.startswith(module + ".") for module in fresh) and id(parameter) not in held:
            found[f"fresh.{name}"] = parameter
            held.add(id(parameter))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in held)
    for parameter in found.values():
        parameter.requires_grad_(True)
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return Trainables(found)


def condition(trainables: Trainables, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How what learns is doing, from its values and what the optimizer remembers; two passes over what learns, so it is asked at measurements only.

    count: parameters (tensors). size: L2 length of everything that learns. idle: share of them whose corrections have all been exactly zero;
    missing where the optimizer remembers nothing, as before the first step.
    """
    parameters = [parameter.detach() for parameter in trainables]
    if not parameters:
        return {}
    found: dict[str, float] = {"count": len(parameters)}
    found |= {"size": float(torch.stack([norm.float() for norm in torch._foreach_norm(parameters)]).norm())}
    moments = [_moment(optimizer.state.get(parameter, {})) for parameter in trainables]
    kept = [moment for moment in moments if moment is not None]
    if kept:
        moved = sum(
            bool(norm > 0) for norm in torch.stack([norm.float() for norm in torch._foreach_norm(kept)]).tolist()
        )
        found["idle"] = 1.0 - moved / len(parameters)
    return found


def _moment(state: dict[str, Any]) -> Tensor | None:
    """What the optimizer remembers of a parameter's gradients: the first of its tensors that is no counter."""
    return next((value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0), None)


def halve_frozen(model: nn.Module) -> None:
    """Keep frozen floating-point weights in bf16; what learns stays fp32."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)


def optimizer_state(
    optimizer: torch.optim.Optimizer, trainables: Trainables
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state by trainable names: (tensors "name/key", JSON values {name: {key: value}})."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in trainables.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    trainables: Trainables,
    tensors: dict[str, Tensor],
    values: dict[str, dict[str, Any]],
) -> None:
    """Put saved state back, each tensor on the device where the optimizer keeps it (step counters stay where torch wants them)."""
    by_name: dict[str, dict[str, Any]] = {name: dict(items) for name, items in values.items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    for name, parameter in trainables.items():
        if name in by_name:
            fused = any(
                parameter is p and group.get("fused") for group in optimizer.param_groups for p in group["params"]
            )
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and (value.dim() > 0 or fused) else value
                for key, value in by_name[name].items()
            }


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, clock: Clock, learning_rate: float) -> float:
    """Give every group its rate: one that was born later follows the schedule from its birth on. Returns the rate of the run itself."""
    factors = {0: schedule.factor(clock)}
    for group in optimizer.param_groups:
        born = group.get("born", 0)
        if born not in factors:
            factors[born] = schedule.factor(clock.since(born))
        group["lr"] = learning_rate * factors[born]
    return learning_rate * factors[0]


def births(optimizer: torch.optim.Optimizer, trainables: Trainables) -> dict[str, int]:
    """The step after which a trainable was born, for each that was born in the course of the run."""
    born = {id(p): group["born"] for group in optimizer.param_groups if group.get("born") for p in group["params"]}
    return {name: born[id(parameter)] for name, parameter in trainables.items() if id(parameter) in born}


def restore_births(optimizer: torch.optim.Optimizer, trainables: Trainables, born: dict[str, int]) -> None:
    """Split the groups of a freshly built optimizer by step of birth, as they were when `births` was taken."""
    when = {id(trainables[name]): step for name, step in born.items()}
    built = [(group, group["params"]) for group in optimizer.param_groups]
    for group, members in built:
        group["params"] = [p for p in members if id(p) not in when]
    for step in sorted(set(born.values())):
        for group, members in built:
            young = [p for p in members if when.get(id(p)) == step]
            if young:
                optimizer.add_param_group({**group, "params": young, "born": step})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def remap_optimizer(
    optimizer: torch.optim.Optimizer, remap: Remap, trainables: Trainables, young: Sequence[dict[str, Any]] = ()
) -> None:
    """Carry per-element optimizer state over a Remap; `trainables` still holds the old parameters when this is called.

    `young`: groups over `remap.young()`, to be added with their step of birth.
    """
    old = dict(trainables.items())
    apart = remap.young()
    groups = optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, fresh in remap.replaced.items():
        if name in apart:
            continue
        source, index = remap.tensors.get(name, (None, None))
        ancestor = old.get(source) if source else old.get(name)
        home = group_of.get(id(ancestor), groups[0]) if ancestor is not None else groups[0]
        state = dict(optimizer.state.get(ancestor, {})) if source and ancestor is not None else {}
        if state and index is not None and ancestor is not None:
            state = {key: _gather(value, index, fresh, ancestor) for key, value in state.items()}
        home["params"].append(fresh)
        if state:
            optimizer.state[fresh] = state
    gone = {id(old[name]) for name in (*remap.removed, *remap.replaced) if name in old}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for name in (*remap.removed, *remap.replaced):
        if name in old:
            optimizer.state.pop(old[name], None)
    for group in young:
        optimizer.add_param_group({**group, "born": remap.born})


def _gather(value: Any, index: Tensor, fresh: nn.Parameter, ancestor: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.numel() != ancestor.numel() or value.dim() == 0:
        return value.clone() if isinstance(value, Tensor) else value  # a step counter moves in place: each owns one
    flat = torch.cat([value.reshape(-1), value.new_zeros(1)])  # index -1 reads the zero at the end
    return flat[index.reshape(-1).to(flat.device)].reshape(fresh.shape)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    return sum(
        v.numel() * v.element_size()
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor)
    )
