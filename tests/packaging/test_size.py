"""Measures of the house: small files, short functions, no hidden state."""

from __future__ import annotations

import ast
import re

import pytest

from .tree import ROOT, files, product

FILES = [*product(), *files("scripts", "*.py")]
VAGUE = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_product_stays_small():
    """What is installed; the scripts that trained the embedded models and measured things are not."""
    assert sum(len(text(path).splitlines()) for path in product()) < 10_000


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
