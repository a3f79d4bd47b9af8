"""The command line. Results go to stdout, everything else to stderr; exit 0 ok, 2 usage, 1 failure, 130 Ctrl-C."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from fastdiff.errors import BadConfig, FastdiffError

from .bench import bench
from .calibrate import calibrate
from .commands import env, generate, inspect, methods, root
from .demo import demo
from .plan import plan
from .quantize import quantize
from .serve import serve

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.callback()(root)
for command in (generate, bench, calibrate, quantize, plan, methods, inspect, env, demo, serve):
    app.command()(command)


def main() -> NoReturn:
    """Entry point of the `fastdiff` program."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. A first argument --traceback shows where an error came from."""
    debug = list(arguments[:1]) == ["--traceback"]
    words = list(arguments[debug:]) or ["--help"]
    return guarded(
        lambda: typer.main.get_command(app).main(words, prog_name="fastdiff", standalone_mode=False), debug=debug
    )


def guarded(work: Callable[[], Any], told: Callable[[str], None] | None = None, *, debug: bool = False) -> int:
    """The exit code of some work. What it raises is printed, as one sentence where it is no bug of ours, and `told`."""
    try:
        code = work()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            traceback.print_exc()
        if message is not None:
            typer.echo(f"error: {message}", err=True)
        if told is not None:
            told(message or "".join(traceback.format_exception_only(error)).strip())
        return _exit_code(error)
    if code == 130:
        typer.echo("interrupted", err=True)
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str | None:
    """What to tell the user; None for a bug of ours."""
    if hasattr(error, "format_message"):  # what typer raises for arguments it cannot parse
        return f"{error.format_message().rstrip('.')}; see fastdiff COMMAND --help"
    if isinstance(error, FastdiffError | OSError):
        return str(error)
    return None


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, BadConfig) or hasattr(error, "format_message") else 1
