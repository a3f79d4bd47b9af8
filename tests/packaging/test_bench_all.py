"""scripts/bench_all.py has a command for each file of benchmarks/, and what it would run is accepted."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

from fastdiff.cli import app

from .tree import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """With the folder of the scripts on the path, as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("bench_all")


def test_no_result_is_an_orphan(script):
    rows = list(script.work())
    made = {path.name for row in rows for path in script.written(row)} | {f"{name}.json" for name in script.KEPT}
    assert {path.name for path in (ROOT / "benchmarks").glob("*.json")} <= made
    order = [row["file"] for row in rows]
    first = next(k for k, file in enumerate(order) if file not in ("plans",) and not file.startswith("evaluation"))
    assert set(order[:first]) >= {"plans", "evaluation-unet"} and order[-1] == "pages"


def test_every_plan_has_a_folder_whose_plans_are_made(script):
    named = {
        Path(plan).name
        for row in script.work() if "scripts/bench_caching.py" in row["command"]
        for file in (ROOT / "benchmarks/configs" / folder_of(row["command"])).glob("*.toml")
        for plan in re.findall(r'^plan = "(.*)"', file.read_text(encoding="utf-8"), re.M)
    }  # fmt: skip
    assert {path.name for path in (ROOT / "benchmarks/plans").glob("*.json")} <= named


def folder_of(command: str) -> str:
    return "-".join(word for word in shlex.split(command)[2:] if not word.startswith("--"))


def test_commands_are_accepted(script, monkeypatch):
    """Parsed by the parsers of the programs; nothing is run."""
    for row in script.work():
        program, *words = shlex.split(row["command"])
        if program == "fastdiff":
            parsed(typer.main.get_command(app), "fastdiff", words)
            continue
        # benchmarks/overlap.sh hands its arguments on, to a script that may be named.
        file = words.pop(0) if words and words[0].endswith(".py") else "scripts/overlap.py"
        assert (ROOT / file).is_file() and (program == "python" or (ROOT / program).is_file()), row
        module = importlib.import_module(Path(file).stem)
        if hasattr(module, "typer"):
            parsed(typer.main.get_command(getattr(module, "app", None) or program_of(module)), file, words)
        elif hasattr(module, "argparse"):
            parsed_by_argparse(module, file, words, monkeypatch)
        else:
            assert not words, f"{file} takes no arguments: {row}"


def program_of(module: ModuleType) -> typer.Typer:
    made = typer.Typer()
    made.command()(module.main)
    return made


def parsed(command: typer.core.TyperCommand, name: str, words: list[str]) -> None:
    with command.make_context(name, list(words), resilient_parsing=False) as context:
        if hasattr(command, "resolve_command"):
            name, inner, rest = command.resolve_command(context, list(words))
            inner.make_context(name, rest, parent=context)


class Parsed(Exception):
    pass


def reads(original):
    def read(self, *arguments):
        original(self, *arguments)
        raise Parsed

    return read


def parsed_by_argparse(module: ModuleType, file: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` does once its arguments are read is left out."""

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [file, *words])
        # `parse_args` calls the other one, and refuses what that one leaves.
        name = "parse_known_args" if "parse_known_args" in inspect.getsource(module) else "parse_args"
        patch.setattr(argparse.ArgumentParser, name, reads(getattr(argparse.ArgumentParser, name)))
        with pytest.raises(Parsed):
            module.main()


@pytest.fixture
def house(script, tmp_path, monkeypatch):
    """Two results and a page, of commands that write what they were called for."""
    folder = tmp_path / "benchmarks"
    (folder / "configs").mkdir(parents=True)
    for name, value in (("ROOT", tmp_path), ("BENCHMARKS", folder), ("STATE", tmp_path / "build/bench_all")):
        monkeypatch.setattr(script, name, value)
    for name, value in (("WHOLE", {}), ("MODELS", ()), ("PAGES", ("python page.py",))):
        monkeypatch.setattr(script, name, value)
    rows = [{"command": f"python a.py {k}", "kept": "old"} for k in range(2)]
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "b.json").write_text(json.dumps({"command": "python b.py"}), encoding="utf-8")
    return folder


def test_it_goes_on_where_it_was_stopped(script, house, monkeypatch, capsys):
    ran: list[str] = []
    refuse = {"python a.py 1"}

    def run(command):
        ran.append(command)
        if command not in refuse and command != "python page.py":
            (house / f"{Path(command.split()[1]).stem}.json").write_text(json.dumps([{"command": command}]))
        return command in refuse

    monkeypatch.setattr(script, "run", run)
    with pytest.raises(SystemExit, match=r"(?s)Start again.*python a.py 1"):
        script.main()
    assert ran == ["python a.py 0", "python a.py 1", "python b.py", "python page.py"]
    assert "old" in (script.STATE / "a.json").read_text(encoding="utf-8"), "what it held is put aside"
    ran.clear()
    refuse.clear()
    script.main()
    assert ran == ["python a.py 1", "python page.py"], "the file no longer names all of its commands"
    capsys.readouterr()
    script.main(listed=True)
    assert "done  a: python a.py 1" in capsys.readouterr().out


def test_a_command_that_writes_nothing_failed_and_some_may_be_asked_for(script, house, monkeypatch):
    monkeypatch.setattr(script, "run", lambda command: 0)
    with pytest.raises(SystemExit, match=r"python b.py$"):
        script.main(only="b.json")
    assert (house / "a.json").exists()


def test_two_do_not_run_beside_each_other(script, house):
    import fcntl

    script.STATE.mkdir(parents=True)
    with (script.STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="beside each other"):
            script.main()
