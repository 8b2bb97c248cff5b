"""Imported by a fork server: afterwards its children find everything that a run needs."""

from engine.warm import warm_up

warm_up()
