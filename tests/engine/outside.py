"""A throw-away package with a thirteenth method: one file and an entry point, as anybody may install it beside the studio."""

from __future__ import annotations

from pathlib import Path

SLUG = "gain-tuning"
METHOD = '''"""Gain tuning: only the scales of the normalisation layers learn."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from engine.core.errors import Fault
from engine.core.method import Card, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.slots import Slot
from engine.train.parts import Parametrization, PartContext


def _gains(every: bool, names: Sequence[str]) -> list[str]:
    found = [name for name in names if "norm" in name.lower() and name.endswith(".weight")]
    return found if every else found[-1:]


class Gains(Parametrization):
    """The chosen scales, as they stand in the model."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def attach(self, model: nn.Module) -> None:
        """Nothing is replaced."""

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        held = dict(model.named_parameters())
        return {f"gain.{name}": held[name] for name in self.names}

    def merge(self, model: nn.Module) -> bool:
        return True


class GainTuning(TrainMethod):
    """Only scales learn."""

    card = Card(
        slug="gain-tuning",
        title="Gain tuning",
        pick_when="Pick this when a few hundred numbers have to be enough and the task is close to what the model does already.",
        summary="Every matrix stays as it is; only the scale behind each normalisation may move.",
        family="Guests",
    )
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {}, "paper": {"every": True}}

    class Params(HyperParams):
        """Which scales."""

        every: bool = dial(True, label="All layers", help="Whether the scales of all layers learn, or only the last one.")

    @classmethod
    def claims(cls, params: Any, facts: Any) -> frozenset[str]:
        return frozenset(_gains(params.every, list(facts.model.tensors)))

    @classmethod
    def check(cls, params: Any, facts: Any) -> list[Fault]:
        if cls.claims(params, facts):
            return []
        return [Fault(where="every", what="This model has no normalisation layers that could be scaled.", why="Nothing would learn.",
                      way_out="Choose LoRA.", code="nothing_learns")]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [Gains(_gains(self.params.every, list(ctx.facts.model.tensors)))]
'''


def make_package(folder: Path) -> Path:
    """Write the package as pip would have installed it; its folder goes onto the path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gain_tuning.py").write_text(METHOD, encoding="utf-8")
    info = folder / "gain_tuning-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gain-tuning\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[bonsai.methods]\ngain-tuning = gain_tuning\n", encoding="utf-8")
    return folder
