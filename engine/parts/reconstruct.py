"""Block-wise repair: train the small set of one pruned block so that it does what the dense block did, then go on to the next.

The inputs of a block are what the repaired blocks before it make; the target is the dense block's output on those same inputs. Only one block
is ever in training, and no loss of the whole model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.core.errors import EngineError, Fault
from engine.parts.chain import BlockChain
from engine.parts.masked import MaskedLinear, start_factors
from engine.parts.targets import replace
from engine.parts.vectors import vectors

SmallSet = Literal["norms", "masklora", "scalelora"]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What is trained in every block, and how."""

    small_set: SmallSet = "masklora"
    with_vectors: bool = True  # norms and biases beside the thin matrices
    r: int = 16
    alpha: float = 32.0
    learning_rate: float = 5e-4
    steps: int = 200
    warmup: float = 0.1
    batches_a_step: int = 1


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """One block before and after: the mean squared difference of its output to the dense block's, and what learned."""

    block: str
    before: float
    after: float
    num_trained: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reconstruct(
    chain: BlockChain, dense: nn.Module, masks: Mapping[str, Tensor], repair: Repair, generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Repaired]:  # fmt: skip
    """Repair every block of the pruned model of `chain` in place, first to last. `masks` go by layer name; `dense` is the same model unpruned."""
    found: list[Repaired] = []
    for place, name in enumerate(chain.names):
        targets = _targets(chain, place, dense.get_submodule(name))
        found.append(_repair_block(chain, place, targets, masks, repair, generator))
        chain.advance()
        progress(place + 1, len(chain.names))
    return found


@torch.no_grad()
def _targets(chain: BlockChain, place: int, dense: nn.Module) -> list[Tensor]:
    pruned, chain.blocks[place] = chain.blocks[place], dense
    try:
        return chain.run(place)
    finally:
        chain.blocks[place] = pruned


def _repair_block(
    chain: BlockChain, place: int, targets: list[Tensor], masks: Mapping[str, Tensor], repair: Repair, generator: torch.Generator,
) -> Repaired:  # fmt: skip
    block, name = chain.blocks[place], chain.names[place]
    before = _error(chain, place, targets)
    learned = _open(block, name, masks, repair, generator)
    if not learned:
        raise EngineError(
            Fault(
                where="params.small_set", what=f"Nothing would learn in {name}.", why="It has no norms or biases.",
                way_out="Choose masklora or scalelora.", code="nothing_learns",
            )
        )  # fmt: skip
    for parameter in block.parameters():
        parameter.requires_grad_(any(parameter is one for one in learned))
    best, kept = before, [one.detach().clone() for one in learned]
    _train(chain, place, targets, learned, repair, generator)
    after = _error(chain, place, targets)
    if not after < best:  # a step that was too large helps nobody: the block stays as it was
        after = best
        with torch.no_grad():
            for one, old in zip(learned, kept, strict=True):
                one.copy_(old)
    num_trained = sum(one.numel() for one in learned)
    for layer_name, layer in list(block.named_modules()):
        if isinstance(layer, MaskedLinear):
            replace(block, layer_name, layer.plain())
    block.requires_grad_(False)
    return Repaired(block=name, before=before, after=after, num_trained=num_trained)


def _open(
    block: nn.Module, name: str, masks: Mapping[str, Tensor], repair: Repair, generator: torch.Generator
) -> list[nn.Parameter]:
    """Put thin matrices on the pruned layers of a block and return everything that learns in it."""
    learned: list[nn.Parameter] = []
    if repair.small_set == "norms" or repair.with_vectors:
        own = dict(block.named_parameters())
        learned += [own[key] for key in vectors({key: tuple(value.shape) for key, value in own.items()}, "both")]
    if repair.small_set == "norms":
        return learned
    kind: Literal["add", "scale"] = "add" if repair.small_set == "masklora" else "scale"
    for inner, module in list(block.named_modules()):
        mask = masks.get(f"{name}.{inner}")
        if mask is None or not isinstance(module, nn.Linear):
            continue
        r = min(repair.r, *module.weight.shape)
        a, b = start_factors(module, r, kind, generator)
        scale = repair.alpha / r if kind == "add" else 1.0
        layer = MaskedLinear(module, mask.to(module.weight.device), a, b, kind=kind, scale=scale, when="always")
        replace(block, inner, layer)
        learned += [layer.lora_A, layer.lora_B]
    return learned


def _train(
    chain: BlockChain, place: int, targets: list[Tensor], learned: list[nn.Parameter], repair: Repair, generator: torch.Generator,
) -> None:  # fmt: skip
    """AdamW without decay, a rise over the first share of the steps and a straight line down."""
    optimizer = torch.optim.AdamW(learned, lr=repair.learning_rate, weight_decay=0.0)
    rise = round(repair.warmup * repair.steps)
    order: list[int] = []
    for step in range(repair.steps):
        factor = (step + 1) / (rise + 1) if step < rise else 1.0 - (step - rise) / max(1, repair.steps - rise)
        optimizer.param_groups[0]["lr"] = repair.learning_rate * factor
        for _ in range(repair.batches_a_step):
            if not order:
                order = torch.randperm(len(targets), generator=generator).tolist()
            number = order.pop()
            loss = _mse(chain, place, targets, number) / repair.batches_a_step
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def _mse(chain: BlockChain, place: int, targets: list[Tensor], number: int) -> Tensor:
    """Mean squared difference over real places [tokens, d]."""
    difference = chain.run_one(place, chain.hidden[number], number) - targets[number]
    real = chain.real[number]
    if real is not None:
        difference = difference[real.to(difference.device)]
    return difference.square().mean()


@torch.no_grad()
def _error(chain: BlockChain, place: int, targets: list[Tensor]) -> float:
    return float(torch.stack([_mse(chain, place, targets, number) for number in range(len(targets))]).mean())
