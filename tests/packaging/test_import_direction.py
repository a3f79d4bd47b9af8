"""Imports go one way: core, rooms, pipelines, front doors (docs/architecture.md); and never in a circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from .tree import HOMES, ROOT, files, layer, module_name, product

CORE_MAY_USE = {*sys.stdlib_module_names, "fastdiff", "pydantic", "torch", "tomli"}
HUGGING_FACE = {"accelerate", "diffusers", "transformers"}
LAZY = {"fastdiff", "fastdiff.registry"}  # name rooms in strings, imported when first used


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    return {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in product()}


def imports(path: Path, module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of all that a file imports, anywhere in it: modules, and what is taken from them."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from (f"{source}.{alias.name}" for alias in node.names)


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


def circles(reached: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, by whatever way, all the others and itself."""

    def behind(module: str) -> set[str]:
        found: set[str] = set()
        ahead = [module]
        while ahead:
            new = reached[ahead.pop()] - found
            found |= new
            ahead += new
        return found

    everything = {module: behind(module) for module in reached}
    groups = {frozenset(n for n in far if m in everything[n]) for m, far in everything.items() if m in far}
    return sorted(sorted(group) for group in groups)


def test_import_direction(trees):
    wrong = []
    for path, tree in trees.items():
        module = module_name(path)
        if module != "fastdiff":  # whose imports are in `if TYPE_CHECKING`, see below
            wrong += [f"{path}: {t}" for t in imports(path, module, tree) if not allowed(layer(module), t)]
    assert not wrong, "these imports go up"


def test_no_circles(trees):
    """Also none under TYPE_CHECKING or inside functions: two files in a circle are one file in two places."""
    modules = {module_name(path): path for path in trees}
    reached = {}
    for module, path in modules.items():
        names = list(imports(path, module, trees[path]))
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        reached[module] = (found & modules.keys()) - {module}
    assert not circles(reached)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"e"}, "e": {"f"}, "f": {"d", "a"}, "g": {"a"}}) == [
        ["b", "c"],
        ["d", "e", "f"],
    ]


def test_the_package_imports_nothing_of_its_own():
    tree = ast.parse((ROOT / "fastdiff/__init__.py").read_text(encoding="utf-8"))
    live = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    targets = {target for node in live for target in imports(Path("__init__.py"), "fastdiff", node)}
    assert {target for target in targets if target.startswith("fastdiff")} == {"fastdiff.version.__version__"}
    assert {target.split(".")[0] for target in targets} <= {"__future__", "fastdiff", "importlib", "typing"}


def test_only_the_lazy_tables_import_by_name(trees):
    by_name = {
        module_name(path)
        for path, tree in trees.items()
        if any(isinstance(node, ast.Attribute) and node.attr == "import_module" for node in ast.walk(tree))
    }
    assert {module for module in by_name if layer(module) == "core"} <= LAZY


def test_no_bare_room_names_outside():
    wrong = []
    for path in [*files("scripts", "*.py"), *files("tests", "*.py")]:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        absolute = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        absolute += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        wrong += [f"{path}: {name}" for name in absolute if name.split(".")[0] in HOMES.keys() - {"fastdiff"}]
    assert not wrong


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
