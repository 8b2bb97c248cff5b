"""Files stay readable in one sitting, the engine explains itself, and nothing of one machine slips in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.source import CODE, Source, page_files, project_files, python_files, read, report

MOST_LINES = 600
HERE = "tests/architecture/test_readable.py"  # the one file that must spell out what it looks for
OF_ONE_MACHINE = re.compile(
    r"""(?<![\w.$~}/-])/(?:root|work|tmp|opt/\w+|mnt/\w+)(?:/|\b)(?!/?\{)"""
    r"""|(?<![\w.$~}/-])/(?:home|Users)/\w+/"""
    r"""|\b[A-Za-z]:\\\\?Users\b"""
)
REGISTRIES = re.compile(
    r"\b(?:test\.)?pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|registry\.yarnpkg\.com"
    r"|conda\.anaconda\.org|deb\.debian\.org|ghcr\.io|docker\.io|quay\.io",
    re.IGNORECASE,
)
UNFINISHED = re.compile(r"\b(?:TODO|FIXME)\b")


def docstring_faults(source: Source) -> Iterator[str]:
    """Public modules, classes and functions without a docstring, or whose first line is no sentence."""
    nodes: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [source.tree]
    nodes += [
        node
        for node in source.tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    ]
    for node in nodes:
        name, line = (source.module, 1) if isinstance(node, ast.Module) else (node.name, node.lineno)
        if isinstance(node, ast.Module) and not source.text.strip():
            continue
        text = ast.get_docstring(node)
        if not text:
            yield f"{source.path}:{line}: {name} has no docstring"
        elif not text.split("\n\n")[0].rstrip().endswith((".", "?", "!", ":")):
            yield f"{source.path}:{line}: the docstring of {name} does not begin with a sentence"


def line_faults(path: str, text: str, pattern: re.Pattern[str]) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for found in pattern.finditer(line):
            yield f"{path}:{number}: {found.group()}"


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project that a person wrote."""
    for path in project_files():
        text = read(path)
        if text is not None and path != HERE and not path.startswith("static/vendor/"):
            yield path, text


def test_no_file_is_too_long() -> None:
    written = [(source.path, source.text) for source in python_files(*CODE, "tests")] + list(page_files())
    faults = [f"{path}: {lines} lines" for path, text in written if (lines := len(text.splitlines())) > MOST_LINES]
    report(faults, f"Split by meaning: {MOST_LINES} lines are the limit, about 400 the aim.")


def test_the_public_names_of_the_engine_are_explained() -> None:
    faults = [fault for source in python_files("engine") for fault in docstring_faults(source)]
    report(faults, "The first line of a docstring is a sentence that a user may read.")


def test_nothing_names_a_folder_of_one_machine() -> None:
    faults = [fault for path, text in texts() for fault in line_faults(path, text, OF_ONE_MACHINE)]
    report(faults, "Use a path relative to the project, a setting, or the tempfile module.")


def test_nothing_names_the_host_of_a_package_registry() -> None:
    faults = [fault for path, text in texts() for fault in line_faults(path, text, REGISTRIES)]
    report(faults, "Installation follows the index that the machine is set up with.")


def test_nothing_is_left_to_do() -> None:
    faults = [fault for path, text in texts() for fault in line_faults(path, text, UNFINISHED)]
    report(faults, "Do it now or open an issue.")


@pytest.mark.parametrize(
    "line", ["cd /root/x", 'open("/tmp/a")', "see /home/ann/notes", r"C:\Users\ann", "(/mnt/disk/app)"]
)
def test_a_folder_of_one_machine_is_noticed(line: str) -> None:
    assert list(line_faults("x.md", line, OF_ONE_MACHINE))


@pytest.mark.parametrize(
    "line", ["engine/work/x", "https://a.example/tmp/x", "/usr/bin/env bash", "/home/", "./root/x"]
)
def test_another_path_is_left_alone(line: str) -> None:
    assert not list(line_faults("x.md", line, OF_ONE_MACHINE))


@pytest.mark.parametrize(
    "text",
    ["def f(): ...", '"""A module."""\nclass A: pass', '"""A module."""\ndef f():\n    """no sentence"""\n'],
)
def test_a_missing_docstring_is_noticed(text: str) -> None:
    assert list(docstring_faults(Source("engine/x.py", text)))


def test_private_names_need_no_docstring() -> None:
    assert not list(docstring_faults(Source("engine/x.py", '"""A module."""\ndef _f(): ...\n')))
