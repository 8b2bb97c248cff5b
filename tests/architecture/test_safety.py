"""Uploads are data, never code; nothing is fetched from another host to draw a page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.source import CODE, Source, dotted, page_files, python_files, report, within

UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNSAFE_CALLS = {
    "torch.load": "it unpickles; use safetensors",
    "pandas.read_pickle": "it unpickles",
    "pd.read_pickle": "it unpickles",
    "os.system": "it goes through a shell; use subprocess with a list",
    "os.popen": "it goes through a shell; use subprocess with a list",
    "subprocess.getoutput": "it goes through a shell; use subprocess with a list",
    "subprocess.getstatusoutput": "it goes through a shell; use subprocess with a list",
    "yaml.unsafe_load": "it can run code; use yaml.safe_load",
    "yaml.full_load": "it can build objects; use yaml.safe_load",
    "yaml.load": "it can run code; use yaml.safe_load",
    "eval": "it runs text as code",
    "exec": "it runs text as code",
    "compile": "it turns text into code",
}
UNSAFE_FLAGS = {
    "shell": "it hands the command to a shell",
    "trust_remote_code": "it runs code from the model's folder",
    "allow_pickle": "it unpickles",
}
ELSEWHERE = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio)\b[^>]*?\b(?:src|href)\s*=\s*["']?(?:https?:)?//[^\s"'>]+"""
    r"""|@import\s+(?:url\()?\s*["']?(?:https?:)?//[^\s"')]+"""
    r"""|\burl\(\s*["']?(?:https?:)?//[^\s"')]+"""
    r"""|\b(?:import|from)\s*\(?\s*["']https?://[^"']+"""
    r"""|\b(?:fetch|importScripts)\(\s*["'`]https?://[^"'`]+""",
    re.IGNORECASE,
)
DELIVERY_HOSTS = re.compile(
    r"\b(?:cdn\.[\w.-]+|unpkg\.com|cdnjs\.\w+|fonts\.g(?:oogleapis|static)\.com|esm\.sh|\w+\.jsdelivr\.net)"
)
CODE_IN_SCRIPT = re.compile(r"\beval\s*\(|\bnew\s+Function\s*\(")


def unsafe_faults(source: Source) -> Iterator[str]:
    """Imports, calls and flags through which data could become code."""
    for found in source.imports:
        if any(within(found.target, name) for name in UNSAFE_MODULES) or found.target in UNSAFE_CALLS:
            yield f"{source.path}:{found.line}: imports {found.target}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in UNSAFE_CALLS:
            yield f"{source.path}:{node.lineno}: calls {name}: {UNSAFE_CALLS[name]}"
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in UNSAFE_FLAGS and not off:
                yield f"{source.path}:{node.lineno}: passes {keyword.arg}: {UNSAFE_FLAGS[keyword.arg]}"


def page_faults(path: str, text: str) -> Iterator[str]:
    """References to other hosts that a browser would load, and code made from text."""
    for pattern in (ELSEWHERE, DELIVERY_HOSTS, CODE_IN_SCRIPT):
        for found in pattern.finditer(text):
            yield f"{path}:{text.count(chr(10), 0, found.start()) + 1}: {found.group()[:100]}"


def test_data_never_becomes_code() -> None:
    faults = [fault for source in python_files(*CODE) for fault in unsafe_faults(source)]
    report(faults, "Read and write safetensors, JSON, CSV or Parquet, and start programs from a list of arguments.")


def test_pages_load_nothing_from_other_hosts() -> None:
    faults = [fault for path, text in page_files() for fault in page_faults(path, text)]
    faults += [fault for source in python_files(*CODE) for fault in page_faults(source.path, markup(source))]
    report(faults, "Serve the file from static/, or from the Python package that brings it.")


def markup(source: Source) -> str:
    """The texts in a Python file, which may hold HTML; its code is looked at by the other test."""
    return "\n".join(
        node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "torch.load(path)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "numpy.load(p, allow_pickle=True)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_an_unsafe_line_is_noticed(text: str) -> None:
    assert list(unsafe_faults(Source("engine/io/x.py", text)))


@pytest.mark.parametrize(
    "text", ["model.eval()", "re.compile(p)", "f(shell=False)", "torch.compile(m)", "f(p, trust_remote_code=False)"]
)
def test_a_safe_line_is_left_alone(text: str) -> None:
    assert not list(unsafe_faults(Source("engine/io/x.py", text)))


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        "@import url(https://example.org/a.css);",
        "import x from 'https://example.org/x.js'",
        "load('cdn.example.org/a.js')",
        "eval(answer)",
    ],
)
def test_another_host_is_noticed(text: str) -> None:
    assert list(page_faults("templates/x.html", text))


def test_a_plain_link_is_left_alone() -> None:
    assert not list(
        page_faults("templates/x.html", '<a href="https://example.org/paper">paper</a> <script src="/static/a.js">')
    )
