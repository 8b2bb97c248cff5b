"""The clock of a run: steps, samples, tokens and epochs done and planned. Everything that depends on progress reads it here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

_PLAN = frozenset({"total_steps", "steps_per_epoch", "num_samples"})


@dataclass(kw_only=True)
class Clock:
    """Progress of a run. `step` counts finished optimizer steps; `epoch` and `batch` are the data cursor."""

    total_steps: int
    steps_per_epoch: int
    num_samples: int  # training examples per epoch
    step: int = 0
    epoch: int = 0
    batch: int = 0  # next micro-batch of this epoch
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, over all attempts

    @property
    def progress(self) -> float:
        return self.step / max(1, self.total_steps)

    @property
    def planned_samples(self) -> int:
        return round(self.total_steps / max(1, self.steps_per_epoch) * self.num_samples)

    @property
    def epochs_done(self) -> float:
        return self.step / max(1, self.steps_per_epoch)

    def since(self, born: int) -> Clock:
        """This clock as something sees it that was born after step `born`: its steps run from there to the end of the run."""
        return self if born == 0 else replace(self, step=self.step - born, total_steps=self.total_steps - born)

    def eta_seconds(self) -> float | None:
        return None if self.step == 0 else self.seconds / self.step * (self.total_steps - self.step)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any], *, plan: bool = True) -> None:
        """Stand where `state` stood; without `plan`, what is planned stays as it is."""
        for name, value in state.items():
            if plan or name not in _PLAN:
                setattr(self, name, value)
