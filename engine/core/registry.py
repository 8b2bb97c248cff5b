"""Discovery: every class with a card in engine/methods/ or behind an entry point "bonsai.methods". No list names methods."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType

from engine.core.method import Method

GROUP = "bonsai.methods"


class RegistryError(RuntimeError):
    """A method file breaks a rule of the catalogue; raised at start-up, for developers."""


@functools.cache
def catalogue() -> dict[str, type[Method]]:
    """All methods by slug, in alphabetical order of their slugs."""
    found: dict[str, type[Method]] = {}
    for method in _discover():
        slug = method.card.slug
        if slug in found and found[slug] is not method:
            raise RegistryError(
                f"Two methods call themselves '{slug}': {found[slug].__module__} and {method.__module__}."
            )
        found[slug] = method
    return dict(sorted(found.items()))


def _discover() -> Iterator[type[Method]]:
    package = importlib.import_module("engine.methods")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        methods = list(methods_in(module))
        expected = info.name.replace("_", "-")
        if [method.card.slug for method in methods] != [expected]:
            raise RegistryError(
                f"engine/methods/{info.name}.py must declare exactly one method, with the slug '{expected}'."
            )
        yield from methods
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        yield from methods_in(loaded) if isinstance(loaded, ModuleType) else [loaded]


def methods_in(module: ModuleType) -> Iterator[type[Method]]:
    """The classes with a card that `module` itself defines."""
    for _, value in sorted(vars(module).items()):
        if (
            inspect.isclass(value)
            and issubclass(value, Method)
            and "card" in vars(value)
            and value.__module__ == module.__name__
        ):
            yield value
