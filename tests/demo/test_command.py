"""`fastdiff demo`: what it refuses before anything starts, and where it listens."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastdiff.cli import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auth", "ada"], "--auth takes user:password"),
        (["--auth", ":x"], "--auth takes user:password"),
        (["--auth", "x:"], "--auth takes user:password"),
        (["--port", "0"], "--port 0"),
        (["--port", "70000"], "--port 70000"),
        (["--port", "x"], "valid integer"),
        (["--no-such"], "No such option"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert run(["demo", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and "Traceback" not in said.err


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["fastdiff.cli.demo"], "find_spec", lambda name: None)
    assert run(["demo"]) == 1
    assert "pip install 'fastdiff[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "share", "auth"),
    [([], False, None), (["--share"], True, None), (["--share", "--auth", "a:b:c"], True, ("a", "b:c"))],
)
def test_it_listens_on_this_machine_and_shares_only_when_told(arguments, share, auth, monkeypatch, capsys, tmp_path):
    gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")
    seen = SimpleNamespace()

    def launch(self, **options):
        seen.options = options
        return None, "http://127.0.0.1:1/", "https://public" if options["share"] else None

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.chdir(tmp_path)
    assert run(["demo", *arguments]) == 0
    assert seen.options["server_name"] == "127.0.0.1"
    assert (seen.options["share"], seen.options["auth"]) == (share, auth)
    said = capsys.readouterr()
    assert said.out.split() == ["http://127.0.0.1:1/", *(["https://public"] if share else [])]
    assert ("--share without --auth" in said.err) == (share and not auth)


def test_a_port_that_is_taken(capsys):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'fastdiff[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["demo", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}: taken" in capsys.readouterr().err


def test_help_needs_no_gradio():
    code = (
        "import sys, fastdiff.cli; fastdiff.cli.run(['demo', '--help']); "
        "sys.exit(bool({'gradio', 'torch'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
