"""The project's own files, read once: what the rules in this folder look at."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("engine", "jobs", "studio", "manage.py")


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` counts as both `a.b` and `a.b.c`, since c may be a module."""

    target: str
    line: int
    at_load: bool  # runs when the module is imported, not later inside a function


@dataclass(frozen=True)
class Source:
    """A Python file: its path within the project, its text and its syntax tree."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Everything this file imports when it runs; imports for type checkers only are left out."""
        return tuple(self._imports(self.tree, at_load=True))

    def _imports(self, node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, at_load)
            elif isinstance(child, ast.ImportFrom):
                base = self._base(child)
                yield Import(base, child.lineno, at_load)
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, at_load)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield from self._imports(other, at_load)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from self._imports(child, at_load=False)
            else:
                if isinstance(child, ast.Call) and (named := imported_by_call(child)):
                    yield Import(named, child.lineno, at_load)
                yield from self._imports(child, at_load)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.module if self.path.endswith("/__init__.py") else self.module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module}" if node.module else package


def imported_by_call(call: ast.Call) -> str | None:
    """The module that `importlib.import_module("name")` or `__import__("name")` names, when it is written out."""
    name = dotted(call.func)
    if name not in ("importlib.import_module", "import_module", "__import__") or not call.args:
        return None
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def dotted(node: ast.expr) -> str:
    """`a.b.c` for such an expression, otherwise an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def within(module: str, package: str) -> bool:
    """Whether a module is a package or lies inside it."""
    return module == package or module.startswith(f"{package}.")


@cache
def project_files() -> tuple[str, ...]:
    """Every file that belongs to the project: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive has no git folder
        hidden = (".venv", "var", ".git")
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and path.relative_to(ROOT).parts[0] not in hidden and "__pycache__" not in path.parts
        ]
    return tuple(sorted(name for name in set(names) if (ROOT / name).is_file()))


@cache
def read(path: str) -> str | None:
    """The text of a file of the project, or None when it is not text."""
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


@cache
def python_files(*tops: str) -> tuple[Source, ...]:
    """The Python files under some top-level folders (or the file named itself)."""
    return tuple(
        Source(path, read(path) or "")
        for path in project_files()
        if path.endswith(".py") and (path in tops or path.split("/", 1)[0] in tops)
    )


@cache
def page_files() -> tuple[tuple[str, str], ...]:
    """Templates, scripts and styles that we wrote, with their text; libraries in static/vendor are not ours."""
    return tuple(
        (path, read(path) or "")
        for path in project_files()
        if path.startswith(("templates/", "static/"))
        and not path.startswith("static/vendor/")
        and path.endswith((".html", ".txt", ".js", ".css", ".svg"))
    )


@cache
def method_slugs() -> frozenset[str]:
    """The slugs of all methods, in both spellings, read from the names of their files."""
    stems = {
        path.removeprefix("engine/methods/").removesuffix(".py")
        for path in project_files()
        if path.startswith("engine/methods/") and path.endswith(".py") and path.count("/") == 2
    }
    stems = {stem for stem in stems if not stem.startswith("_")}
    return frozenset(stems | {stem.replace("_", "-") for stem in stems})


def report(faults: list[str], rule: str) -> None:
    """Fails with every offence at once and the way out."""
    assert not faults, f"{rule}\n" + "\n".join(sorted(faults))
