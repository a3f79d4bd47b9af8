"""The examples: those that can run here do, of the others the config is accepted and the names exist."""

from __future__ import annotations

import ast
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff
from fastdiff.caching import REGISTRY

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@each
def test_its_config_is_accepted(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    configs = [
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CONFIG"
    ]  # fmt: skip
    assert len(configs) == (file.stem != "custom_cache")
    for config in configs:
        assert fastdiff.Config(**config) != fastdiff.Config()


@each
def test_every_name_it_imports_exists(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


@each
def test_what_was_not_run_says_so(file):
    told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    hub = "MODEL = " in file.read_text(encoding="utf-8")
    assert ("NOT RUN" in told) == hub


@pytest.fixture
def registered():
    """A method that is registered while a test runs is taken out after it."""
    before = dict(REGISTRY._table)
    yield
    REGISTRY._table.clear()
    REGISTRY._table.update(before)


def test_a_cache_method_in_fifteen_lines(registered, tmp_path, monkeypatch, capsys):
    file = EXAMPLES / "custom_cache.py"
    body = next(n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))
    assert (body.end_lineno or 0) - body.lineno < 15
    monkeypatch.chdir(tmp_path)
    REGISTRY._table["golden"] = "fastdiff_golden:Golden"  # whoever tries the plugin has it
    runpy.run_path(str(file), run_name="__main__")
    assert "20 steps: 8 computed, 12 cached" in capsys.readouterr().out
    assert (tmp_path / "golden.png").stat().st_size > 500


@pytest.mark.slow
def test_one_picture_on_two_processes(tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "multi_gpu.py"))
    done = subprocess.run([sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("8 steps") == 1 and (tmp_path / "multi_gpu.png").is_file()


@pytest.mark.slow
def test_a_quantized_copy_is_smaller_and_draws(tmp_path):
    main = runpy.run_path(str(EXAMPLES / "quantize_and_save.py"))["main"]
    main(tmp_path / "small")
    assert (tmp_path / "small" / "ring.png").is_file()


def test_the_notebook_runs_from_top_to_bottom():
    """Its cells one after the other; the values that it shows are pictures and a strip."""
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "stored without results"
    names: dict = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            *before, last = ast.parse("".join(cell["source"])).body
            if isinstance(last, ast.Expr) and cell["id"] != "cell-1" and "draw()" not in ast.unparse(last):
                exec(compile(ast.Module(before, []), cell["id"], "exec"), names)
                shown.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), names))
            else:
                exec(compile(ast.Module([*before, last], []), cell["id"], "exec"), names)
    kinds = [type(value).__name__ for value in shown]
    assert kinds == ["Image", "Accelerated", "Image"] and "cached" in str(names["fast"].report)
    assert 20 < names["decibels"] < 80
