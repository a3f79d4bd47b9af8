"""The site builds without a dead link, its made pages say what the code says, and what the pages show runs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest
import typer

from fastdiff.cli import app
from fastdiff.config import layers_of, resolve
from fastdiff.registry import ROOMS, names
from fastdiff.studio import settings

from .tree import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block; `needs` says what a machine must have for it that the tests have not."""

    page: str
    number: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks(*languages: str, pages: Sequence[Path] = DOCS) -> list[Block]:
    found = []
    for page in pages:
        for number, one in enumerate(FENCE.finditer(page.read_text(encoding="utf-8"))):
            if one["language"] in languages:
                found.append(Block(page.stem, number, one["language"], one["text"], one["needs"]))
    return found


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/docs.py as mkdocs loads it: with its folder on the path."""
    pytest.importorskip("mkdocs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("docs")


@pytest.fixture(scope="module")
def site(script, tmp_path_factory) -> Path:
    """The whole site, built as `make docs` does; a warning fails."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


def test_the_site_builds_strictly_and_has_a_page_for_each_method(site):
    for kind, listed in names().items():
        for name in listed:
            assert f'method = "{name}"' in shown(site / "methods" / kind / name / "index.html")
    reference = shown(site / "config" / "index.html")
    assert "predictor" in reference and "fullgraph" in reference
    assert [page for page in site.rglob("*.html") if "<!-- made" in page.read_text(encoding="utf-8")] == []


def shown(page: Path) -> str:
    """The text of a page, without its tags."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f": {page.name}\n" not in text] == []


@pytest.mark.parametrize("kind", ROOMS)
def test_pages_of_methods_have_every_setting(script, kind):
    for name, cls in script.own(kind).items():
        page = script.method_page(kind, name, cls) + script.shared_settings()
        assert [field for field in cls.model_fields if field != "method" and f"| `{field}` |" not in page] == []
        assert page.startswith(f"# {name}\n") and "http" in page and '!!! abstract "Formula"' in page


def test_numbers_of_a_method_are_those_of_the_benchmarks(script):
    rows = json.loads((ROOT / "benchmarks/shapes-unet.json").read_text(encoding="utf-8"))
    row = next(row for row in rows if row["name"] == "deepcache-3")
    told = script.measured("cache", "deepcache")
    assert (
        f"| deepcache-3 | {row['steps']} | {row['computed_steps']} | {row['speedup']:.2f} | {row['psnr']:.1f}" in told
    )
    assert "no row" in script.measured("cache", "no_such_method")
    for kind, name in (("parallel", "pcpp"), ("quant", "w8a8")):
        rows = json.loads((ROOT / f"benchmarks/{kind}-quality.json").read_text(encoding="utf-8"))["rows"]
        found = [row for row in rows if (row.get(kind) or {}).get("method") == name]
        told = script.measured(kind, name)
        assert found and all(f"| {row['name']} | " in told and f"| {row['psnr']:.1f} | " in told for row in found)


def test_rivals_that_are_not_beaten_are_named(script):
    told = script.rivals()
    for path in (ROOT / "benchmarks").glob("*-verdict.json"):
        for row in json.loads(path.read_text(encoding="utf-8")):
            assert row["rival"] in told
            if not row["beaten_by"]:
                assert f"| {row['rival']} | {row['speedup']:.2f} | {row['psnr']:.1f} | **not beaten** |" in told


@pytest.fixture
def solver_tables(script, tmp_path, monkeypatch):
    """The tables of docs/solvers.md, of measurements that a test writes."""
    monkeypatch.setattr(script.solver_tables, "BENCHMARKS", tmp_path)
    return script.solver_tables


def test_tables_of_solvers_wait_for_their_measurement(solver_tables):
    assert [made() for made in solver_tables.parts().values()] == ["Not measured yet."] * 3


def test_grids_stand_side_by_side_and_the_best_is_bold(solver_tables, tmp_path):
    def row(name, kind, steps, decibels):
        return {
            "name": name,
            "kind": kind,
            "computed_steps": steps,
            "psnr_converged": decibels,
            "scheduler": "DDIMScheduler",
        }

    rows = [
        row("baseline", "baseline", 50, 44.3), row("fitted-5", "fastdiff", 5, 30.66),
        row("fitted-8", "fastdiff", 8, 40.0),
        row("5 steps", "fewer_steps", 5, 26.2), row("5 steps UniPC AYS", "fewer_steps", 5, 31.04),
        row("8 steps UniPC AYS", "fewer_steps", 8, None),
    ]  # fmt: skip
    (tmp_path / "shapes-unet-solver.json").write_text(json.dumps(rows), encoding="utf-8")
    assert solver_tables.grids().splitlines() == [
        "| evaluations | 5 | 8 |", "| --- | --- | --- |", "| fitted | 30.7 | **40.0** |", "| DDIM | 26.2 | - |",
        "| UniPC AYS | **31.0** | - |",
    ]  # fmt: skip


def test_searches_that_miss_are_counted_as_such(solver_tables, tmp_path):
    kept = {"model": "shapes-dit", "seed": 1, "target": 34.0, "chosen": "solver 8", "speedup": 3.5, "measured": 35.1,
            "unseen": 34.0, "kept": 0.625, "single": "solver 7", "single_speedup": 3.1}  # fmt: skip
    missed = kept | {"target": 35.0, "unseen": 34.97}
    tries = [missed, kept, {"model": "shapes-dit", "seed": 2, "target": 36.0, "chosen": None}]
    told = {"tries": tries, "fit": 16, "prompts": 12, "judges": 24}
    (tmp_path / "tune.json").write_text(json.dumps(told), encoding="utf-8")
    found = solver_tables.tuned()
    assert found.startswith("1 of 3 searches reach their target on 24 captions")
    assert "| shapes-dit | 1 | 34 | solver 8 | 3.50 | 3.10, solver 7 | 35.1 | 34.0 | 62% |" in found
    assert "| shapes-dit | 2 | 36 | nothing | - | - | - | - | - |" in found


def test_types_are_said_in_words(script):
    assert script.type_of({"type": "integer", "minimum": 1, "maximum": 6}) == "whole number 1 to 6"
    assert script.type_of({"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]}) == "number from 0"
    assert script.type_of({"enum": ["a", "b"]}) == "`a`, `b`"
    assert script.type_of({"type": "array", "items": {"type": "string"}}) == "list of text"


def test_a_formula_stands_in_a_frame_with_all_its_lines(script):
    class Method:
        """What it does.

        Formula: x_i = x_j,
        j the last step.

        More.
        """

    frame = '!!! abstract "Formula"\n    x_i = x_j,\n    j the last step.\n'
    assert script.paragraphs(Method) == f"What it does.\n\n{frame}\nMore."


def test_an_unknown_part_is_refused(script):
    with pytest.raises(Exception, match=r"index.md asks for the part 'presets_table'; there are config-sections"):
        script.part("presets_table", "index.md")


def test_links_out_of_the_folder_and_names_of_methods_lead_somewhere(script):
    assert script.linked("| `dp` | x |\n`dp` | y") == "| [`dp`](methods/cache/dp.md) | x |\n`dp` | y"
    assert script.linked("| `first_block`, `dbcache` | x |").count("methods/cache/") == 2
    assert script.linked("| `no_method` | x |") == "| `no_method` | x |"


def test_figures_of_steps_are_those_of_the_measurement(script):
    figures = script.step_figures
    for name, model, rows in figures.figures():
        assert (ROOT / "docs/images" / f"{name}.svg").read_text(encoding="utf-8") == figures.strips(model, rows)
        told = json.loads((ROOT / "benchmarks/steps.json").read_text(encoding="utf-8"))["models"][model]
        assert {row["method"] for row in rows} == {row["method"] for row in told}


# what the pages show


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block, tmp_path, monkeypatch):
    if block.needs:
        compile(block.text, block.page, "exec")
        pytest.skip(f"needs {block.needs}")
    from fastdiff.caching import REGISTRY
    from fastdiff.pipelines.families import FAMILIES

    for owner in (REGISTRY, FAMILIES):
        for attribute in ("_table", "_known"):
            if hasattr(owner, attribute):
                monkeypatch.setattr(owner, attribute, dict(getattr(owner, attribute)))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec(compile(block.text, f"<docs/{block.page}.md>", "exec", dont_inherit=True), names)
    assert names.keys() - {"__name__", "__builtins__"}, "an example makes something"


@pytest.mark.parametrize("block", [b for b in blocks("toml") if "[project" not in b.text], ids=str)
def test_toml_is_a_config(block, tmp_path):
    if block.needs:
        pytest.skip(f"needs {block.needs}")
    file = tmp_path / "example.toml"
    file.write_text(block.text, encoding="utf-8")
    config = resolve(layers_of(file)).config
    assert type(config).from_json(config.model_dump_json()) == config


LINES = [
    (block, line)
    for block in blocks("sh", "console", "bash", "shell", pages=[README, *DOCS])
    for line in block.text.replace("\\\n", " ").splitlines()
    if re.match(r"(\$ )?fastdiff ", line)
]


@pytest.mark.parametrize(("block", "line"), LINES, ids=[f"{block}-{line[:40]}" for block, line in LINES])
def test_commands_are_accepted(block, line):
    """Parsed by the program's own parser: names of commands, options, types; what is set together is a config. Nothing
    is run."""
    words = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    words = words[: next((k for k, word in enumerate(words) if word in ("|", ">", "&", "&&", ";")), len(words))]
    root = typer.main.get_command(app)
    with root.make_context("fastdiff", list(words), resilient_parsing=True) as context:
        name, command, rest = root.resolve_command(context, list(words))  # type: ignore[attr-defined]
        made = command.make_context(name, rest, parent=context)
    assert made.command is root.commands[name]
    values = {"preset": None, "config": None, "sets": None, "devices": None} | made.params
    if name == "generate" and not values["config"]:  # others bring a method of their own
        sets = [text for text in values["sets"] or [] if not text.endswith(".json")]  # which is not here
        assert resolve(settings.layers(values["preset"], None, None, None, sets, values["devices"])).config


def test_blocks_that_are_left_out_say_what_they_need():
    assert all(len(block.needs) > 8 for block in blocks("python", "toml") if block.needs)
