"""`methods`, `inspect`, `env`, and the program itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff

COMMANDS = ("generate", "bench", "calibrate", "methods", "inspect", "env")


def program(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "fastdiff", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = program("--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "fastdiff.cli.commands" in imported
    assert not imported & {"torch", "diffusers", "transformers", "numpy"}


def test_exit_codes() -> None:
    assert program("methods", "--json").returncode == 0
    assert program("generate", "x", "--steps", "0").returncode == 2
    missing = program("inspect", "none.png")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == "error: 'none.png' does not exist\n"


def test_traceback_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    from fastdiff.cli import run

    assert run(["--traceback", "inspect", "none.png"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_no_arguments_is_help(cli) -> None:
    assert cli().out.startswith("Usage: fastdiff")
    assert cli("--version").out == f"{fastdiff.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert f"Usage: fastdiff {command}" in done.out


def test_methods(cli) -> None:
    assert json.loads(cli("methods", "--json").out) == fastdiff.methods()
    table = cli("methods").out
    assert all(name in table for known in fastdiff.methods().values() for name in known)


def test_env(cli) -> None:
    found = json.loads(cli("env", "--json").out)
    assert found["fastdiff"] == fastdiff.__version__
    assert found["packages"]["torch"]
    assert found["cores"] >= 1
    assert "diffusers" in cli("env").out


def test_inspect_model(cli, model: str) -> None:
    found = json.loads(cli("inspect", model, "--json").out)
    (unet,) = found["denoisers"]
    assert found["pipeline"] == "StableDiffusionPipeline"
    assert (unet["component"], unet["family"], unet["recognised"]) == ("unet", "unet2d", True)
    assert 0 < unet["size"] < found["parameters"]
    assert set(unet["methods"]) == set(fastdiff.methods()["cache"])
    assert unet["methods"]["deepcache"] is None
    assert "no stack of transformer blocks" in unet["methods"]["first_block"]
    assert unet["backends"]["native"] is None
    assert "not tried" in unet["backends"]["flash_hub"]
    table = cli("inspect", model).out
    assert "StableDiffusionPipeline" in table
    assert "first_block" in table


def test_inspect_config_shows_origins(cli) -> None:
    Path("c.toml").write_text('preset = "balanced"\n[cache]\nwarmup_steps = 5\n')
    done = cli("inspect", "c.toml", "--set", "cache.order=1", "--json")
    found = json.loads(done.out)
    assert found["config"]["cache"]["warmup_steps"] == 5
    assert found["origins"]["cache.method"] == "preset balanced"
    assert found["origins"]["cache.warmup_steps"] == "file c.toml"
    assert found["origins"]["cache.order"] == "--set cache.order=1"
    rows = cli("inspect", "c.toml").out.splitlines()
    assert any(row.split() == ["cache.warmup_steps", "5", "file", "c.toml"] for row in rows)
    assert any(row.split() == ["parallel", "off", "default"] for row in rows)


def test_inspect_config_for_a_model(cli, model: str) -> None:
    Path("c.toml").write_text('[cache]\nmethod = "ab_cache"\n[family.unet.cache]\ninterval = 4\n')
    plain = cli("inspect", "c.toml", "--json")
    assert json.loads(plain.out)["config"]["cache"]["interval"] == 2
    assert "add -m MODEL" in cli("inspect", "c.toml").err
    found = json.loads(cli("inspect", "c.toml", "-m", model, "--json").out)
    assert found["config"]["cache"]["interval"] == 4
    assert found["origins"]["cache.interval"] == "file c.toml (unet)"


def test_inspect_png(cli, model: str) -> None:
    cli("generate", "a cat", "-m", model, "--steps", 2, "--seed", 3, "--set", "cache.method=deepcache")
    found = json.loads(cli("inspect", "out.png", "--json").out)
    assert (found["prompt"], found["seed"], found["config"]["cache"]["method"]) == ("a cat", 3, "deepcache")
    assert set(found["origins"].values()) == {"image out.png"}
    assert "a cat" in cli("inspect", "out.png").out


def test_model_and_set_belong_to_configs(cli, model: str) -> None:
    assert cli("inspect", model, "--set", "cache.interval=3").code == 2
