"""Imports go one way: core, rooms, pipelines, front doors (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .tree import FRONT_DOORS, HOMES, ROOT, files, module_name, product

ROOMS = ("caching", "parallel", "quant")
CORE_MAY_USE = {*sys.stdlib_module_names, "fastdiff", "pydantic", "torch", "tomli"}
HUGGING_FACE = {"accelerate", "diffusers", "transformers"}
LAZY = {"fastdiff", "fastdiff.registry"}  # name rooms in strings, imported when first used


def layer(module: str) -> str:
    """Layer of a module of fastdiff: core, a room's name, pipelines or front."""
    head = [*module.split("."), ""][1]
    if head in (*ROOMS, "pipelines"):
        return head
    return "front" if head in FRONT_DOORS else "core"


def imports(path: Path, module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of all that a file imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from names if source in ("fastdiff", base) else [source]


def allowed(own: str, target: str) -> bool:
    """May a module of layer `own` import `target`?"""
    package = target.split(".")[0]
    if package in HOMES and package != "fastdiff":
        return False  # a bare room name would load the room twice
    if package != "fastdiff":
        return own in ("pipelines", "front") or (
            package in CORE_MAY_USE if own == "core" else package not in HUGGING_FACE
        )
    reached = layer(target)
    return {
        "core": reached == "core",
        "pipelines": reached != "front",
        "front": True,
    }.get(own, reached in ("core", own))


@pytest.mark.parametrize("path", product(), ids=str)
def test_import_direction(path):
    module = module_name(path)
    if module == "fastdiff":
        return  # its imports are in `if TYPE_CHECKING`, see below
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    wrong = [target for target in imports(path, module, tree) if not allowed(layer(module), target)]
    assert not wrong, f"{path} ({layer(module)}) must not import {wrong}"


def test_the_package_imports_nothing_of_its_own():
    tree = ast.parse((ROOT / "fastdiff/__init__.py").read_text(encoding="utf-8"))
    live = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {t for node in live for t in imports(Path("__init__.py"), "fastdiff", node)} <= {
        "__future__",
        "fastdiff.version",
        "importlib",
        "typing",
    }


@pytest.mark.parametrize("path", [p for p in product() if layer(module_name(p)) == "core"], ids=str)
def test_only_the_lazy_tables_import_by_name(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    by_name = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "import_module"]
    assert not by_name or module_name(path) in LAZY


@pytest.mark.parametrize("path", [*files("scripts", "*.py"), *files("tests", "*.py")], ids=str)
def test_no_bare_room_names_outside(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    absolute = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    absolute += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    assert not {name.split(".")[0] for name in absolute} & {"caching", "parallel", "quant", "pipelines"}


@pytest.mark.parametrize(
    ("own", "target", "verdict"),
    [
        ("core", "fastdiff.caching.base", False),
        ("core", "diffusers", False),
        ("core", "torch.nn", True),
        ("caching", "fastdiff.clock", True),
        ("caching", "fastdiff.quant", False),
        ("caching", "fastdiff.pipelines.loading", False),
        ("quant", "diffusers.models", False),
        ("pipelines", "fastdiff.images", False),
        ("pipelines", "fastdiff.caching.session", True),
        ("front", "caching.base", False),
    ],
)
def test_the_rule_itself(own, target, verdict):
    assert allowed(own, target) is verdict
