"""Training steps through compiled blocks: the repeated blocks of a model run as code that torch.compile made of them, once for all blocks and lengths.

What is compiled is the `forward` of a block's class, so that one compilation serves every block. A block runs compiled while it learns, where autograd follows
what it is asked; everything else is computed as ever: measuring, writing answers, the frozen blocks below everything that learns, and the export. Attention over
examples that share a row needs their lengths as numbers, so it stays outside: each block is two pieces of compiled code with attention between them.

How exact: sums are taken in another order, so that the loss after 50 steps agrees with the plain path within 1e-4 in fp32, which a test compares. Noise is drawn
as the plain path draws it. An interrupted run computes the same bits again (`FirstShapes`); whatever does not fit the code that was made at the start,
such as layers that have grown, runs as ever. Methods whose layers change as they learn are left out by `cannot["compile"]`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.core.control import write_json
from engine.core.errors import EngineError, Fault

if TYPE_CHECKING:
    from engine.train.run import Run

Backend = str | Callable[..., Any]
BACKEND = "inductor"
FILE = "compiled.json"  # in the job's folder
FOLDER = "compiled"  # below the studio's home/cache, or in the job's folder where there is no home


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what the library can also recompute block by block."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def compiled(run: Run, *, backend: Backend = BACKEND) -> Iterator[None]:
    """Run the blocks of this run compiled while they learn, where its recipe says so; leaves the model as it was."""
    blocks = blocks_of(run.model) if run.settings.compile == "on" else []
    if not blocks:
        if run.settings.compile == "on":
            message = (
                "Nothing of this model is compiled: the library marks no repeated blocks in it. Each step runs as ever."
            )
            run.log.emit("log", {"level": "warning", "message": message}, step=run.clock.step)
        yield
        return
    message = "The first step compiles the blocks of the model, which takes from half a minute to a few minutes; it can be stopped after that step."
    run.log.emit("log", {"level": "info", "message": message}, step=run.clock.step)
    with _kept_in(_folder(run)), _attention_outside():
        twins = {kind: _twin(kind, run, blocks, backend) for kind in {type(block) for block in blocks}}
        for block in blocks:
            block.__class__ = twins[type(block)]
        back = {twin: kind for kind, twin in twins.items()}
        try:
            with torch.compiler.set_stance(
                "eager_on_recompile"
            ):  # whatever does not fit what was compiled runs as ever
                yield
        finally:
            for module in run.model.modules():
                if type(module) in back:
                    module.__class__ = back[type(module)]
            torch.compiler.reset()


def _twin(kind: type[nn.Module], run: Run, blocks: list[nn.Module], backend: Backend) -> type[nn.Module]:
    """A class that answers like `kind`, compiled where autograd follows. A class, not a function on each block, so that a copy of the model computes with its
    own weights."""
    plain: Any = kind.forward
    quick = torch.compile(plain, dynamic=True, backend=backend)
    shapes = FirstShapes(run.folder / FILE, kind.__name__)
    ready = False

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal ready
        if not (self.training and torch.is_grad_enabled() and hidden_states.requires_grad):
            return plain(self, hidden_states, *args, **kwargs)
        try:
            if not ready:
                ready = True
                above = blocks[blocks.index(self) :] if self in blocks else [self]
                shapes.show(quick, [block for block in above if type(block) is type(self)], hidden_states, args, kwargs)
            return quick(self, hidden_states, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _failed(error) from error

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "forward": forward})


class FirstShapes:
    """The shapes of what the first block was asked in the first step of a run, kept in its folder.

    Code is made for any length, but the compiler takes the lengths that it sees first for usual and cuts its loops by them. So that a run that was interrupted
    computes the same bits again, it is shown the same shapes again before anything else; afterwards nothing new is compiled.
    """

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def show(self, quick: Any, blocks: list[nn.Module], *asked: Any) -> None:
        """Compile the code of these blocks for the remembered shapes, or for those of `asked`, which are remembered from now on."""
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        if self.name not in known:
            known[self.name] = _described(asked)
            write_json(self.file, known)
        device = asked[0].device
        before = [parameter.grad for block in blocks for parameter in block.parameters()]
        with (
            torch.compiler.set_stance("default"),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(
                lambda kept: kept, lambda kept: kept
            ),  # nobody recomputes this pass
        ):
            for block in blocks:
                hidden, args, kwargs = _rebuilt(known[self.name], device)
                quick(block, hidden, *args, **kwargs)
        assert all(
            a is b for a, b in zip(before, (p.grad for block in blocks for p in block.parameters()), strict=True)
        )


def _described(value: Any) -> Any:
    """What a block was asked, as JSON: of numbers with a fraction the shape alone, of whole numbers and masks also the values."""
    if isinstance(value, Tensor):
        told = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "follows": value.requires_grad,
        }
        return {"tensor": told if value.is_floating_point() else {**told, "values": value.flatten().tolist()}}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_described(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {name: _described(item) for name, item in value.items()}}
    return {"plain": value if isinstance(value, bool | int | float | str) else None}


def _rebuilt(told: dict[str, Any], device: torch.device) -> Any:
    """What `_described` read, with zeros where it kept no values."""
    ((kind, value),) = told.items()
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        if "values" in value:
            return torch.tensor(value["values"], dtype=dtype, device=device).view(value["shape"])
        made = torch.zeros(value["shape"], dtype=dtype, device=device, requires_grad=value["follows"])
        return made * 1 if value["follows"] else made  # in a model it is never a leaf
    if kind in {"tuple", "list"}:
        return (tuple if kind == "tuple" else list)(_rebuilt(item, device) for item in value)
    return {name: _rebuilt(item, device) for name, item in value.items()} if kind == "dict" else value


@contextlib.contextmanager
def _attention_outside() -> Iterator[None]:
    """Attention runs as it is, between two pieces of compiled code."""
    inside = ALL_ATTENTION_FUNCTIONS["sdpa"]

    @torch.compiler.disable(reason="The lengths of packed examples are data.")  # type: ignore[untyped-decorator]
    def outside(*args: Any, **kwargs: Any) -> Any:
        return inside(*args, **kwargs)

    outside.__wrapped__ = inside
    ALL_ATTENTION_FUNCTIONS.register("sdpa", outside)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", inside)


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """The compiler keeps what it makes in a folder of its owner alone, and works in this process: a pool of processes would outlive a fork and a cancelled run."""
    import torch._dynamo
    import torch._inductor.codecache as files
    import torch._inductor.config

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    headers = str(folder / "precompiled_headers")
    with (
        # Headers that it has read before lie in a temporary folder whose name everyone can guess, whatever the first of these variables says.
        patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}),
        patch.multiple(files, _HEADER_DIR=headers, _HEADER_LOCK_DIR=f"{headers}/locks"),
        # One pass through a block gives two pieces with attention between them, not four.
        torch._dynamo.config.patch(nested_graph_breaks=True, suppress_errors=False),
        torch._inductor.config.patch(compile_threads=1, fallback_random=True),
    ):
        files._precompile_header.cache_clear()
        try:
            yield
        finally:
            files._precompile_header.cache_clear()


def _folder(run: Run) -> Path:
    home = os.environ.get("BONSAI_HOME")
    return Path(home) / "cache" / FOLDER if home else run.folder / FOLDER


def _failed(error: Exception) -> EngineError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return EngineError(
        Fault(
            where="settings.compile",
            code="not_compiled",
            what="The blocks of this model could not be compiled.",
            why=f"The compiler said: {said[0][:300]}",
            way_out="Start the run again with 'Compile the blocks' switched off; it learns the same, only slower.",
        ),
        "environment",
    )
