"""A method is one file and everything else is derived from it: no ladder over slugs, no list of methods."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.source import CODE, Source, method_slugs, page_files, project_files, python_files, read, report

IN_PAGES = re.compile(r"""slug\s*(?:===?|!==?)\s*["'][^"'{]+["']""")
ARRAY = re.compile(r"\[[^\[\]{}]*\]")
QUOTED = re.compile(r"""["']([\w-]+)["']""")


def names_a_slug(node: ast.expr) -> bool:
    """Whether an expression holds a slug, by its name: slug, method_slug, card.slug, row["slug"]."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value).endswith("slug")
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name == "slug" or name.endswith("_slug")


def texts(node: ast.expr) -> list[str]:
    """The texts written out in an expression: one, or those of a tuple, list, set or the keys of a dict."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    parts: list[ast.expr | None] = []
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        parts = list(node.elts)
    elif isinstance(node, ast.Dict):
        parts = list(node.keys)
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def ladder_faults(source: Source, slugs: frozenset[str]) -> Iterator[str]:
    """Decisions by slug: comparisons, matches and beginnings."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            written = [text for side in sides for text in texts(side) if text]
            by_slug = written and any(map(names_a_slug, sides))
            by_method = any(ast.unparse(side).endswith("method") for side in sides) and set(written) & slugs
            if by_slug or by_method:
                yield f"{source.path}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Match) and names_a_slug(node.subject):
            yield f"{source.path}:{node.lineno}: match {ast.unparse(node.subject)}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
            and names_a_slug(node.func.value)
        ):
            yield f"{source.path}:{node.lineno}: {ast.unparse(node)}"


def list_faults(source: Source, slugs: frozenset[str]) -> Iterator[str]:
    """Literals that name two methods or more. The allowed values of a field, `Literal[...]`, are a type and no list."""
    types = {
        id(node.slice)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict) and id(node) not in types:
            named = {text.replace("_", "-") for text in texts(node)} & slugs
            if len(named) > 1:
                yield f"{source.path}:{node.lineno}: names {', '.join(sorted(named))}"


def array_faults(path: str, text: str, slugs: frozenset[str]) -> Iterator[str]:
    """The same in a template, a script or a data file."""
    for found in ARRAY.finditer(text):
        named = {name.replace("_", "-") for name in QUOTED.findall(found.group())} & slugs
        if len(named) > 1:
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path}:{line}: names {', '.join(sorted(named))}"


def outside_methods() -> list[Source]:
    return [source for source in python_files(*CODE) if not source.path.startswith("engine/methods/")]


def test_nothing_decides_by_slug() -> None:
    faults = [fault for source in outside_methods() for fault in ladder_faults(source, method_slugs())]
    for path, text in page_files():
        faults += [f"{path}: {found.group()}" for found in IN_PAGES.finditer(text)]
    report(faults, "A hook is missing: ask the method, its card or its part instead of comparing its slug.")


def test_no_list_of_methods_is_kept() -> None:
    slugs = method_slugs()
    faults = [fault for source in outside_methods() for fault in list_faults(source, slugs)]
    data = [
        (path, read(path) or "")
        for path in project_files()
        if path.startswith(("engine/", "jobs/", "studio/")) and path.endswith((".json", ".toml", ".yaml", ".yml"))
    ]
    for path, text in [*page_files(), *data]:
        faults += array_faults(path, text, slugs)
    report(faults, "Methods are found by the catalogue; derive what you need from their cards.")


SLUGS = frozenset({"lora", "hft", "nuclear-norm"})


@pytest.mark.parametrize(
    "text",
    [
        "if slug == 'lora': pass",
        "x = 1 if method.card.slug in ('lora', 'hft') else 2",
        "if 'lora' != row['slug']: pass",
        "if ref.method == 'lora': pass",
        "match method_slug:\n    case 'lora': pass",
        "if slug.startswith('lo'): pass",
    ],
)
def test_a_ladder_is_noticed(text: str) -> None:
    assert list(ladder_faults(Source("engine/ops/x.py", text), SLUGS))


@pytest.mark.parametrize(
    "text",
    [
        "if a.slug == b.slug: pass",
        "if request.method == 'POST': pass",
        "if slug == '': pass",
        "if slot == 'loss': pass",
    ],
)
def test_a_plain_comparison_is_left_alone(text: str) -> None:
    assert not list(ladder_faults(Source("engine/ops/x.py", text), SLUGS))


@pytest.mark.parametrize("text", ["a = ['lora', 'hft']", "a = {'lora': 1, 'nuclear_norm': 2}", "f(('hft', x, 'lora'))"])
def test_a_list_is_noticed(text: str) -> None:
    assert list(list_faults(Source("studio/x.py", text), SLUGS))


def test_one_name_or_a_type_is_no_list() -> None:
    text = "a = ['lora', 'other']\nkind: Literal['lora', 'hft'] = 'lora'\n"
    assert not list(list_faults(Source("studio/x.py", text), SLUGS))
    assert list(array_faults("static/x.js", 'const a = ["lora", "hft"];', SLUGS))
    assert not list(array_faults("static/x.js", 'const a = ["lora"]; b["hft"]', SLUGS))
