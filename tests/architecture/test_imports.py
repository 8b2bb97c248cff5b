"""Who may import whom (docs/architecture.md, Rooms), and who must stay free of torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest

from tests.architecture.source import CODE, Source, python_files, report, within

WEB = ("django", "channels", "huey", "ninja", "unfold", "daphne", "uvicorn", "whitenoise", "django_htmx", "environ")
TORCH = ("torch", "transformers", "peft", "accelerate", "opacus", "pytorch_optimizer", "sentence_transformers", "trl")
TORCH_MODULES = (*TORCH, "safetensors.torch")
TEST_ONLY = ("trl", "datasets", "mergekit", "pytest", "hypothesis", "playwright", "schemathesis", "tests")
# What the web may know of the engine, and what therefore must not load torch.
PUBLIC = ("engine.core", "engine.io.datasets", "engine.io.facts", "engine.starters", "engine.client")
# What the studies of the studio share with those of the engine.
MEASURING = ("engine.bench.measure", "engine.bench.pages")
TORCH_FREE = (*PUBLIC, *MEASURING, "jobs", "studio", "manage")

# The first room that contains a module decides what it may import of the project.
ROOMS: dict[str, tuple[str, ...]] = {
    "engine.core": ("engine.core",),
    "engine.io": ("engine.core", "engine.io"),
    "engine.starters": ("engine.core", "engine.starters"),
    "engine.tasks": ("engine.core", "engine.io", "engine.starters", "engine.tasks", "engine.train.parts"),
    "engine.parts": (
        "engine.core",
        "engine.io",
        "engine.parts",
        "engine.tasks.base",
        "engine.tasks.batching",
        "engine.train.parts",
        "engine.train.trainables",
    ),
    "engine.methods": ("engine.core", "engine.io", "engine.parts", "engine.tasks", "engine.train.parts"),
    "engine.train": ("engine.core", "engine.io", "engine.tasks", "engine.train", "engine.client"),
    "engine.ops": (
        "engine.core",
        "engine.io",
        "engine.starters",
        "engine.tasks",
        "engine.parts",
        "engine.train",
        "engine.ops",
    ),
    "engine.client": ("engine.core",),
    "engine": ("engine",),
    "jobs.bench": ("jobs", *PUBLIC, *MEASURING),
    "jobs.management": ("jobs", *PUBLIC, *MEASURING),
    "jobs": ("jobs", *PUBLIC),
    "studio": ("studio", "jobs"),
    "manage": (),
}
PROJECT = ("engine", "jobs", "studio", "manage", "tests")


def room_faults(source: Source) -> list[str]:
    """Imports of the project that the file's room does not allow."""
    room = next(room for room in ROOMS if within(source.module, room))
    faults = []
    for found in source.imports:
        target = found.target
        # The empty package is a stop on the way to its modules, and discovery needs the folder of the methods.
        if target in ("engine", "engine.__version__", "engine.methods") or not any(within(target, t) for t in PROJECT):
            continue
        one_method = target.startswith("engine.methods.")
        a_package_on_the_way = any(within(allowed, target) for allowed in ROOMS[room])
        if one_method or not (a_package_on_the_way or any(within(target, allowed) for allowed in ROOMS[room])):
            allowed = ", ".join(ROOMS[room]) or "nothing of the project"
            faults.append(f"{source.path}:{found.line}: {room} may not import {target}; it may import {allowed}.")
    return faults


def banned_faults(source: Source, banned: Iterable[str], why: str) -> list[str]:
    """Imports of the banned libraries, at load or later."""
    banned = tuple(banned)
    return [
        f"{source.path}:{found.line}: imports {found.target}; {why}."
        for found in source.imports
        if any(within(found.target, name) for name in banned)
    ]


def way_to_torch(start: str, sources: dict[str, Source]) -> list[str] | None:
    """The shortest chain of imports at load time that ends in a library which loads torch."""
    queue, seen = deque([[start]]), {start}
    while queue:
        way = queue.popleft()
        for found in sources[way[-1]].imports:
            if not found.at_load:
                continue
            if any(within(found.target, name) for name in TORCH_MODULES):
                return [*way, found.target]
            parts = found.target.split(".")
            for end in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b first
                module = ".".join(parts[:end])
                if module in sources and module not in seen:
                    seen.add(module)
                    queue.append([*way, module])
    return None


def test_each_room_imports_only_what_it_may() -> None:
    faults = [fault for source in python_files(*CODE) for fault in room_faults(source)]
    report(faults, "Move the code, or pass the value in from above; docs/architecture.md has the table of rooms.")


def test_the_engine_knows_nothing_of_the_web() -> None:
    faults = [
        fault
        for source in python_files("engine")
        for fault in banned_faults(source, WEB, "the engine must run without any web framework")
    ]
    report(faults, "Give the engine a plain value or a folder instead.")


def test_the_product_needs_no_tool_of_the_tests() -> None:
    faults = [
        fault
        for source in python_files(*CODE)
        for fault in banned_faults(source, TEST_ONLY, "it is installed for development only")
    ]
    report(faults, "The product must run from requirements.lock alone.")


def test_torch_free_modules_import_no_torch() -> None:
    faults = [
        fault
        for source in python_files(*CODE)
        if any(within(source.module, room) for room in TORCH_FREE)
        for fault in banned_faults(source, TORCH_MODULES, "this module is loaded by the web process")
    ]
    report(faults, "Ask the engine service through engine.client instead.")


def test_torch_free_modules_reach_no_torch_through_others() -> None:
    sources = {source.module: source for source in python_files(*CODE)}
    faults = []
    for module in sources:
        if any(within(module, room) for room in TORCH_FREE) and (way := way_to_torch(module, sources)):
            faults.append(" imports ".join(way))
    report(faults, "The web process would load torch by this way.")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("engine/core/recipe.py", "from engine.train import loop"),
        ("engine/methods/lora.py", "from engine.methods.dora import Dora"),
        ("engine/methods/lora.py", "from . import dora"),
        ("engine/methods/lora.py", "import engine.ops.train"),
        ("engine/parts/masks.py", "def f():\n    from engine.methods import hft"),
        ("engine/ops/train.py", "import importlib\nimportlib.import_module('engine.methods.lora')"),
        ("jobs/supervisor.py", "from engine.io import models"),
        ("jobs/supervisor.py", "from studio import settings"),
        ("engine/service.py", "import jobs.models"),
        ("studio/pages.py", "from engine.train.loop import run"),
    ],
)
def test_a_forbidden_room_is_noticed(path: str, line: str) -> None:
    assert room_faults(Source(path, line))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("engine/methods/lora.py", "from engine.core.method import Method\nfrom engine.parts import masks"),
        ("engine/core/registry.py", "import importlib\nimportlib.import_module('engine.methods')"),
        ("engine/core/method.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engine.train.parts"),
        ("jobs/tasks.py", "from engine.io.datasets import read\nfrom engine import client\nimport torchless"),
        ("studio/urls.py", "from jobs import actions\nfrom studio import pages"),
    ],
)
def test_an_allowed_room_is_left_alone(path: str, line: str) -> None:
    assert room_faults(Source(path, line)) == []


def test_a_hidden_way_to_torch_is_noticed() -> None:
    sources = {
        source.module: source
        for source in (
            Source("engine/__init__.py", ""),
            Source("engine/io/__init__.py", "from safetensors.torch import load_file"),
            Source("engine/io/facts.py", "import json"),
            Source("jobs/tasks.py", "from engine.io.facts import look"),
            Source("jobs/late.py", "def f():\n    import engine.io.facts"),
        )
    }
    assert way_to_torch("jobs.tasks", sources) == ["jobs.tasks", "engine.io", "safetensors.torch"]
    assert way_to_torch("jobs.late", sources) is None
    assert banned_faults(Source("jobs/x.py", "def f():\n    import torch.nn"), TORCH_MODULES, "no")
