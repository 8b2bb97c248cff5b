"""The lock files fit pyproject.toml, hold nothing tied to one kind of machine, and one command checks everything."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.source import ROOT, report

PIN = re.compile(r"^([\w.-]+)==([\w.!+-]+)$", re.MULTILINE)
CUDA_ONLY = re.compile(r"^(?:nvidia-(?!ml-py)|cuda-|triton|torchvision|torchaudio)")


def pins(*names: str) -> dict[str, str]:
    """Package to version, from lock files."""
    found = {}
    for name in names:
        found.update({canonicalize_name(n): v for n, v in PIN.findall((ROOT / name).read_text(encoding="utf-8"))})
    return found


def unmet(requirements: list[str], locked: dict[str, str]) -> list[str]:
    """The requirements that the lock does not meet."""
    return [
        f"{requirement} (locked: {version})"
        for requirement in map(Requirement, requirements)
        if (version := locked.get(canonicalize_name(requirement.name))) is None
        or not requirement.specifier.contains(version, prereleases=True)
    ]


def test_the_locks_meet_the_project() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    faults = unmet(table["dependencies"], pins("requirements.lock"))
    faults += unmet(table["optional-dependencies"]["dev"], pins("requirements.lock", "requirements-dev.lock"))
    report(faults, "Run `make lock` and commit both lock files.")


def test_the_locks_fit_every_kind_of_machine() -> None:
    locked = pins("requirements.lock", "requirements-dev.lock")
    report([name for name in locked if CUDA_ONLY.match(name)], "torch brings these itself where they are needed.")
    report([f"{n}=={v}" for n, v in locked.items() if "+" in v], "A local version exists only on one index.")


def test_torch_is_pinned_exactly_and_first() -> None:
    first = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#"))
    assert first in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert first.startswith("torch==")


def test_an_unmet_requirement_is_noticed() -> None:
    assert unmet(["a>=2"], {"a": "1.0"}) and unmet(["b"], {}) and not unmet(["a~=1.0"], {"a": "1.4"})


def test_the_build_machine_runs_the_same_command_as_a_person() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert steps.rstrip().endswith("\nmake test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
