"""Measures of the house: small files, short functions, no hidden state."""

from __future__ import annotations

import ast
import io
import re
import tokenize

import pytest

from .tree import ROOT, files, product

FILES = [*product(), *files("scripts", "*.py")]
DOORS = {"cli", "bench", "demo", "serve", "jobs"}
VAGUE = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


def code_lines(source):
    """Numbers of the lines that hold code: no comments, no docstrings, nothing blank."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [(t.start[0], t.end[0]) for t in tokens if t.type not in NO_CODE]
    found = {line for start, end in spans for line in range(start, end + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            found -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


@pytest.mark.parametrize(("doors", "most"), [(False, 10_000), (True, 14_000)], ids=["levers", "all"])
def test_the_product_stays_small(doors, most):
    """Code that is installed, without and with the front doors; comments, docstrings and blank lines do not count, so
    that nobody saves on what explains. The first plan, 10,000 lines for all of it, did not hold: demo, server, jobs,
    bench and command line are 4,000 of them."""
    counted = [path for path in product() if doors or not DOORS & set(path.parts)]
    assert sum(len(code_lines(text(path))) for path in counted) < most


def test_what_counts_as_code():
    source = (
        '"""Words."""\n\n# why\ndef f(x):  # more\n    """Words,\n    two lines."""\n    return (\n        x\n    )\n'
    )
    assert code_lines(source) == {4, 7, 8, 9}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file(path):
    source = text(path)
    assert len(source.splitlines()) <= 400, "split this file"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source), "finish it, or open an issue"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_and_state(path):
    wrong = []
    for node in ast.walk(ast.parse(text(path))):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or line) - line >= 60:
            wrong.append(f"line {line}: {node.name} is longer than 60 lines")
        if isinstance(node, ast.Global):
            wrong.append(f"line {line}: global {', '.join(node.names)}")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            wrong.append(f"line {line}: no environment variable decides behaviour")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_say_something(path):
    defined = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.walk(ast.parse(text(path))) if isinstance(node, defined)]
    words = {word.lower() for name in (*path.with_suffix("").parts, *names) for word in WORD.findall(name)}
    assert not words & VAGUE
