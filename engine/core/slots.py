"""Slots: where a part goes in a training run, and how many may stand there. The arity is the composition law."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Arity(StrEnum):
    """How many parts a slot holds."""

    ONE = "one"
    MANY = "many"


class Slot(StrEnum):
    """The nine places of a *train* operation, in the order in which a person meets them."""

    PARAMETRIZATION = "parametrization"
    OBJECTIVE = "objective"
    LOSS_TERM = "loss_term"
    GRADIENT_RULE = "gradient_rule"
    DATA_POLICY = "data_policy"
    OPTIMIZER = "optimizer"
    SCHEDULE = "schedule"
    UPDATE_RULE = "update_rule"
    WATCHER = "watcher"

    @property
    def arity(self) -> Arity:
        return Arity.ONE if self in _ONE else Arity.MANY

    @property
    def words(self) -> str:
        """The name as a person reads it."""
        return self.value.replace("_", " ")

    @property
    def law(self) -> str:
        return _LAWS[self]


_ONE = {Slot.OBJECTIVE, Slot.OPTIMIZER, Slot.SCHEDULE, Slot.UPDATE_RULE}

_LAWS = {
    Slot.PARAMETRIZATION: "Several may stand together as long as no weight is claimed twice; at least one is needed.",
    Slot.OBJECTIVE: "Exactly one says what is being learned.",
    Slot.LOSS_TERM: "Any number may be added to the objective.",
    Slot.GRADIENT_RULE: "Any number, applied in the order in which they are written.",
    Slot.DATA_POLICY: "Any number, ordered by phase: load, select, augment, mix, format, collate.",
    Slot.OPTIMIZER: "Exactly one moves the weights.",
    Slot.SCHEDULE: "Exactly one sets the learning rate over time.",
    Slot.UPDATE_RULE: "Exactly one owns the step; without a choice it is ordinary back-propagation.",
    Slot.WATCHER: "Any number; they look and speak but change nothing.",
}


class Phase(IntEnum):
    """The order of data policies."""

    LOAD = 0
    SELECT = 1
    AUGMENT = 2
    MIX = 3
    FORMAT = 4
    COLLATE = 5
