"""Talking on stderr, and keeping third parties from doing so."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table


def say(text: str) -> None:
    typer.echo(text, err=True)


def warn(text: str) -> None:
    typer.secho(f"warning: {text}", fg="yellow", err=True)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes long; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(text):
        yield


def quiet() -> None:
    """Silence the logs, warnings and loading bars of diffusers and transformers; only for the command line."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def print_table(rows: Sequence[tuple[str, ...]], *headers: str) -> None:
    """A table on stdout; the last column folds, the others never do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, no_wrap=header is not headers[-1], overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
