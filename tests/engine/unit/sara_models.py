"""Models with SaRA on them, for its tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.control import Control
from engine.core.events import EventLog
from engine.core.facts import ModelFacts
from engine.io.facts import model_facts
from engine.methods.sara import SaRA, SmallWeights
from engine.ops.check import require
from engine.ops.train import prepare
from engine.train.run import Run
from tests.engine.attached import Attached, facts_for
from tests.engine.tiny import Tiny, lay


def sara(**params: Any) -> SaRA:
    return SaRA(SaRA.Params(**params))


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def encoder(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32).eval()


def described(tiny: Tiny) -> ModelFacts:
    return model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm")


def attached(tiny: Tiny, *, seed: int = 3, **params: Any) -> Attached:
    return Attached(
        decoder(tiny.folder / "decoder"), sara(**params), facts_for(described(tiny), "causal_lm"), seed=seed
    )


def tuning(of: Attached) -> SmallWeights:
    assert isinstance(of.part, SmallWeights)
    return of.part


def masks(of: Attached) -> dict[str, Tensor]:
    """The first mask of every tensor as a boolean tensor."""
    found = {}
    for name, entries in tuning(of).entries.items():
        mask = torch.zeros(math.prod(entries.shape), dtype=torch.bool)
        mask[entries.index.long()] = True
        found[name] = mask.view(entries.shape)
    return found


def ready(tiny: Tiny, folder: Path, methods: list[tuple[str, dict[str, Any]]], **settings: Any) -> Run:
    folder = lay(folder, tiny.recipe(methods, **settings))
    run = prepare(require(tiny.recipe(methods, **settings)), folder, EventLog(folder), Control(folder))
    run.model.eval()  # tiny models have no dropout; keep it so
    return run


def part_of(run: Run) -> SmallWeights:
    part = run.slots.parametrizations[0]
    assert isinstance(part, SmallWeights)
    return part


def advance(run: Run, micro: list[dict[str, Tensor]]) -> None:
    from engine.bench.workbench import step

    step(run, micro)
    run.log.flush()


def layer_weights(tiny: Tiny) -> dict[str, Tensor]:
    state = decoder(tiny.folder / "decoder").state_dict()
    return {f"{name}.weight": state[f"{name}.weight"] for name in described(tiny).linears}
