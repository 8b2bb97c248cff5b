"""A model as a chain of blocks: run one block at a time on stored hidden states, so that each sees what the edited blocks before it make.

The whole model runs once over the calibration batches to learn what enters the first block and what else every block is given (masks, positions).
After that no more than one block is ever at work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.core.errors import EngineError, bad_input
from engine.parts.blocks import blocks_of
from engine.parts.pruning import Pattern, keep_per_row, prunable_in, same_tensor, save_masks, summary, wanda_score
from engine.parts.sparsegpt import output_error, sparsegpt

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder
    from engine.ops.work import WorkContext

_READ_BY_MODEL = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class BlockChain:
    """The blocks of a live model, and the hidden states [B, T, d] that enter block `position`, one tensor a batch."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model = model
        self.names = block_names(model)
        self.blocks = [model.get_submodule(name) for name in self.names]
        self.real = [batch["attention_mask"].bool() if _flat(batch) else None for batch in batches]
        self._given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.blocks]
        self.hidden: list[Tensor] = []
        self.position = 0
        if not batches:
            raise bad_input("data", "There is no text to look at.", "The inputs of every layer are measured on a few texts.",
                            "Give a data set with some texts.", "no_calibration")  # fmt: skip
        for number, batch in enumerate(batches):
            self._look(batch, first=number == 0)

    @torch.no_grad()
    def _look(self, batch: Mapping[str, Tensor], *, first: bool) -> None:
        entered: list[Tensor] = []

        def remember(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = dict(kwargs)
                hidden = args[0] if args else rest.pop("hidden_states")
                if place == 0 or first:
                    entered.append(hidden.detach())
                self._given[place].append((args[1:], rest))

            return hook

        hooks = [block.register_forward_pre_hook(remember(i), with_kwargs=True) for i, block in enumerate(self.blocks)]
        try:
            inputs = {name: batch[name] for name in _READ_BY_MODEL if name in batch}
            device = next(self.model.parameters()).device
            inputs = {name: value.to(device) for name, value in inputs.items()}
            self.model(**inputs, **({"use_cache": False} if _writes(self.model) else {}))
        finally:
            for hook in hooks:
                hook.remove()
        self.hidden.append(entered[0].clone())
        if first:
            self._refuse_detours(entered)

    def _refuse_detours(self, entered: list[Tensor]) -> None:
        """A model that does more between its blocks than pass on cannot be cut there."""
        if len(entered) != len(self.blocks):
            raise _uncuttable(f"{len(self.blocks)} blocks were found and {len(entered)} were used")
        for place in range(len(self.blocks) - 1):
            out = self.run_one(place, entered[place], 0)
            if not torch.allclose(out, entered[place + 1], rtol=1e-4, atol=1e-4 * float(out.abs().max())):
                raise _uncuttable(f"what leaves {self.names[place]} is not what enters the next block")

    def run_one(self, place: int, hidden: Tensor, batch: int) -> Tensor:
        """What one block makes of a hidden state, with the masks and positions of that batch."""
        args, kwargs = self._given[place][batch]
        out = self.blocks[place](hidden, *args, **kwargs)
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        return result

    @torch.no_grad()
    def run(self, place: int) -> list[Tensor]:
        """What a block makes of the stored states of all batches."""
        return [self.run_one(place, hidden, number) for number, hidden in enumerate(self.hidden)]

    @torch.no_grad()
    def advance(self) -> None:
        """Let the current block, as it is now, make the states for the next one."""
        self.hidden = self.run(self.position)
        self.position += 1

    def linears(self, place: int, chosen: Mapping[str, Any]) -> dict[str, nn.Linear]:
        """The chosen linear layers of a block by their full names."""
        prefix = self.names[place] + "."
        found = {f"{prefix}{name}": module for name, module in self.blocks[place].named_modules()}
        return {name: module for name, module in found.items() if name in chosen and isinstance(module, nn.Linear)}

    @torch.no_grad()
    def measure(self, layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> None:
        """Run the current block over all batches; `see(name, x [n, in])` gets the inputs of its layers, without places of padding."""
        number = 0

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x, real = args[0].detach(), self.real[number]
                if (
                    real is None or x.shape[:2] != real.shape
                ):  # nothing padded, or a layer that sees a flat list of tokens
                    see(name, x.reshape(-1, x.shape[-1]))
                else:
                    see(name, x[real.to(x.device)])

            return hook

        hooks = [module.register_forward_pre_hook(hook_for(name)) for name, module in layers.items()]
        try:
            for number, hidden in enumerate(self.hidden):
                self.run_one(self.position, hidden, number)
        finally:
            for hook in hooks:
                hook.remove()


def block_names(model: nn.Module) -> list[str]:
    """The repeated blocks of a model in their order; refuses what has none, or two piles of them."""
    layout = blocks_of(model)
    if not layout.blocks:
        raise _uncuttable("it has no repeated blocks with attention")
    if len({block.stack for block in layout.blocks}) > 1:
        raise _uncuttable("it has an encoder and a decoder")
    first = [block.modules()[0] for block in layout.blocks]
    return [module.name.removesuffix("." + module.place) for module in first]


Masks = dict[str, Tensor]
Progress = Callable[[int, int], None]


def prune_blockwise(
    chain: BlockChain, layers: Mapping[str, Any], prune: Callable[[str, nn.Linear, Inputs], Tensor], *,
    full: bool, progress: Progress = lambda done, total: None,
) -> tuple[Masks, dict[str, float]]:  # fmt: skip
    """Prune block after block in place; every block is measured on what the pruned blocks before it make.

    `prune(name, module, inputs)` writes the new weight and returns the mask. Returns the masks by tensor name, and for each layer the relative
    change of its output, ||(W - W') X||^2 / ||W X||^2 (with `full` input statistics; without, only the diagonal of X X^T counts).
    """
    masks: Masks = {}
    errors: dict[str, float] = {}
    for place in range(len(chain.blocks)):
        chosen = chain.linears(place, layers)
        seen = {name: Inputs(module.in_features, module.weight.device, full=full) for name, module in chosen.items()}
        chain.measure(chosen, lambda name, x, seen=seen: seen[name].add(x))  # type: ignore[misc]
        for name, module in chosen.items():
            before = module.weight.detach().clone()
            masks[f"{name}.weight"] = prune(name, module, seen[name])
            hessian = seen[name].hessian
            whole = output_error(before, torch.zeros_like(before), hessian)
            errors[name] = output_error(before, module.weight.detach(), hessian) / max(whole, 1e-30)
        chain.advance()
        progress(place + 1, len(chain.blocks))
    return masks, errors


class Inputs:
    """What entered a layer: the number of tokens and either X X^T [in, in] or its diagonal alone."""

    def __init__(self, width: int, device: torch.device, *, full: bool) -> None:
        self.num_tokens = 0
        self.full = full
        self._sum = torch.zeros(width, width, device=device) if full else torch.zeros(width, device=device)

    def add(self, x: Tensor) -> None:
        """Count inputs x [n, in]."""
        x = x.float()
        self._sum += x.T @ x if self.full else x.square().sum(0)
        self.num_tokens += x.shape[0]

    @property
    def square_sums(self) -> Tensor:
        """Sum of squares of every input [in]."""
        return self._sum.diagonal() if self.full else self._sum

    @property
    def hessian(self) -> Tensor:
        """X X^T [in, in]; only its diagonal is known when `full` is off."""
        return self._sum if self.full else self._sum.diag()


def prune_wanda(module: nn.Linear, inputs: Inputs, pattern: Pattern) -> Tensor:
    """Wanda on one layer, in place: the smallest |W_ij| ||x_j|| of every row go; nothing else moves."""
    score = wanda_score(module.weight.detach().float(), inputs.square_sums)
    mask = pattern.keep(score) if pattern.structured else keep_per_row(score, pattern.sparsity)
    with torch.no_grad():
        module.weight.copy_(torch.where(mask, module.weight, 0.0))
    return mask


def prune_sparsegpt(name: str, module: nn.Linear, inputs: Inputs, pattern: Pattern, *, damping: float, block: int) -> Tensor:  # fmt: skip
    """SparseGPT on one layer, in place."""
    try:
        weight, mask = sparsegpt(module.weight.detach(), inputs.hessian, pattern, damping=damping, block=block)
    except torch.linalg.LinAlgError as error:
        raise bad_input(
            "params.damping", f"The inputs of {name} are too much alike to be inverted.", "The texts are few or nearly the same.",
            "Give more calibration texts, or a larger damping.", "singular",
        ) from error  # fmt: skip
    with torch.no_grad():
        module.weight.copy_(weight)
    return mask


def prune_and_write(
    source: ModelFolder, out: OutFolder, ctx: WorkContext, title: str, pattern: str, samples: int,
    prune: Callable[[str, nn.Linear, Inputs], Tensor], *, full: bool,
) -> None:  # fmt: skip
    """Load the first model, prune it block by block on calibration texts, and write weights, masks and a report."""
    homes = prunable_in(source.folder, source, title, pattern)
    model = ctx.load_model(0)
    batches = ctx.calibration(samples)
    masks, errors = prune_blockwise(BlockChain(model, batches), homes, prune, full=full, progress=ctx.progress)
    write_live(model, source, out)
    named = {homes[name.removesuffix(".weight")]: mask for name, mask in masks.items()}
    save_masks(out.folder, named)
    ctx.report["mask"] = summary(named)
    ctx.report["output_change"] = {name: round(error, 6) for name, error in errors.items()}
    ctx.report["calibration"] = {"texts": sum(len(b["input_ids"]) for b in batches), "tokens": _count_tokens(batches)}


def write_live(model: nn.Module, source: ModelFolder, out: OutFolder) -> None:
    """Write the weights of a live model under the names and in the number formats of the folder it came from."""
    live = model.state_dict()
    homes = {same_tensor(name, source.layout): name for name in live}
    with out.weights(source.layout) as writer:
        for name in writer.order:
            tensor = live[homes[name]].detach().cpu() if name in homes else source[name]
            writer.put(name, tensor.to(source.layout[name][0]))


def _count_tokens(batches: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(int(b["attention_mask"].sum()) if _flat(b) else b["input_ids"].numel() for b in batches)


def _flat(batch: Mapping[str, Tensor]) -> bool:
    return "attention_mask" in batch and batch["attention_mask"].dim() == 2


def _writes(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return hasattr(config, "use_cache") and hasattr(model, "lm_head")


def _uncuttable(why: str) -> EngineError:
    return bad_input(
        "model.source", "This model cannot be worked on block by block.", f"Its blocks do not form one chain: {why}.",
        "Choose magnitude pruning, or a model of another family, such as Llama, OPT, Qwen or BERT.", "no_chain",
    )  # fmt: skip
