"""Exit codes: 0 ok, 1 failure, 2 usage, 130 Ctrl-C; and what is said of an error."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import typer

from fastdiff.errors import BadConfig, FastdiffError


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
