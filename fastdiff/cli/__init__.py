"""The command line. Results go to stdout, everything else to stderr; exit 0 ok, 2 usage, 1 failure, 130 Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from fastdiff import threads
from fastdiff.studio.guard import guarded

from .advise import advise
from .bench import bench
from .calibrate import calibrate
from .commands import env, generate, inspect, methods, root
from .demo import demo
from .plan import plan
from .quantize import quantize
from .serve import serve
from .tune import tune

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.callback()(root)
for command in (generate, bench, calibrate, quantize, tune, plan, advise, methods, inspect, env, demo, serve):
    app.command()(command)


def main() -> NoReturn:
    """Entry point of the `fastdiff` program."""
    threads.settle()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. A first argument --traceback shows where an error came from."""
    debug = list(arguments[:1]) == ["--traceback"]
    words = list(arguments[debug:]) or ["--help"]
    return guarded(
        lambda: typer.main.get_command(app).main(words, prog_name="fastdiff", standalone_mode=False), debug=debug
    )
