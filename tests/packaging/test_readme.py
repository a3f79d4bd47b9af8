"""README says what is: generated parts are up to date, links exist, examples run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.config import layers_of, resolve
from fastdiff.registry import names

from .tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
COMMAND = Path(sys.executable).with_name("fastdiff")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def fastdiff(*arguments: str) -> str:
    ran = subprocess.run([str(COMMAND), *arguments], capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_script", ROOT / "scripts/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date(script):
    assert script.rendered(README) == README, "run `make readme`"
    assert script.results_page() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), "run `make readme`"


def test_check_mode_tells(script, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "README.md"
    stale.write_text(README.replace("| `static` |", "| `statik` |"), encoding="utf-8")
    monkeypatch.setattr(script, "README", stale)
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert script.main() == 1
    assert "make readme" in capsys.readouterr().err
    assert "statik" in stale.read_text(encoding="utf-8")
    stale.write_text("no markers", encoding="utf-8")
    assert script.main() == 1
    assert "needs the markers" in capsys.readouterr().err


def test_presets_table(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.rows_of("shapes-unet") == []
    assert "benchmarks/shapes-unet.json does not exist" in capsys.readouterr().err
    assert "Not measured yet." in script.presets({"shapes-unet": []})
    row = {
        "name": "balanced",
        "kind": "preset",
        "steps": 50,
        "computed_steps": 20,
        "speedup": 2.016,
        "psnr": 120.0,
        "ssim": 0.98765,
        "psnr_converged": None,
        "prompt_accuracy": 0.9,
    }
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "benchmarks/shapes-unet.json"
    file.write_text(json.dumps([row]))
    rows = script.rows_of("shapes-unet")
    table = script.presets({"shapes-unet": rows})
    assert "| balanced | preset | 50 | 20 | 2.02 | identical | 0.988 | - | 0.900 |" in table
    assert "2.02 times as fast" in script.picture(rows)
    file.write_text(json.dumps([{"name": "balanced"}]))
    with pytest.raises(script.OutOfShape, match="without kind, steps"):
        script.rows_of("shapes-unet")


def test_one_list_of_methods():
    told = re.search(r"<!-- methods:start -->(.*)<!-- methods:end -->", README, re.DOTALL)[1]
    listed = {kind: re.findall(rf"^\| `(\w+)` \| {kind} \|", told, re.MULTILINE) for kind in names()}
    known = {kind: sorted(methods) for kind, methods in names().items()}
    assert listed == known
    printed = json.loads(fastdiff("methods", "--json"))
    assert {kind: sorted(methods) for kind, methods in printed.items()} == known


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not re.match(r"https?:|mailto:|#", t)]
    missing = [target for target in local if not ((ROOT / page).parent / target).is_file()]
    assert not missing


@pytest.mark.parametrize("code", blocks("python"), ids=["first", "second"])
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(code, "<README>", "exec"), names)
    assert names["fast"].report.steps > 0


@pytest.mark.parametrize("text", blocks("toml"), ids=["first"])
def test_config_examples_are_accepted(text, tmp_path):
    file = tmp_path / "example.toml"
    file.write_text(text, encoding="utf-8")
    assert resolve(layers_of(file)).config.cache is not None


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fastdiff ")]


@pytest.mark.parametrize("name", sorted({shlex.split(line)[1] for line in COMMANDS}))
def test_commands_have_the_options_shown(name):
    told = fastdiff(name, "--help")
    words = [w for line in COMMANDS for w in shlex.split(line, comments=True)[2:] if shlex.split(line)[1] == name]
    unknown = {word for word in words if re.fullmatch(r"--?[a-z-]+", word) and word not in told}
    assert not unknown


def test_make_targets_shown_exist():
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {target for page in PAGES for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / page).read_text())}
    assert shown - {"an", "it"} <= set(known)
