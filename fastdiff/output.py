"""Result files: refused before the work starts, complete or absent after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import BadConfig, FastdiffError


def check(files: Iterable[Path | None], overwrite: bool) -> None:
    """Raises BadConfig for a file that exists (unless `overwrite`), or whose directory is missing or not writable."""
    wanted = [file for file in files if file is not None]
    for file in wanted:
        if wanted.count(file) > 1:
            raise BadConfig(f"two results would go to {str(file)!r}; give each its own file")
        if file.is_dir():
            raise BadConfig(f"{str(file)!r} is a directory; give a file name")
        if file.exists() and not overwrite:
            raise BadConfig(f"{str(file)!r} exists; pass --overwrite or another name")
        if not file.parent.is_dir():
            raise BadConfig(f"directory {str(file.parent)!r} does not exist")
        if not os.access(file.parent, os.W_OK):
            raise BadConfig(f"directory {str(file.parent)!r} is not writable")


def write(file: Path, save: Callable[[Path], object]) -> None:
    """Save to a temporary file beside `file` and move it there, so that nobody ever sees half of it."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=file.suffix)
    os.close(handle)
    part = Path(name)
    try:
        save(part)
        part.chmod(0o644)  # mkstemp's files are for their owner only
        part.replace(file)
    except OSError as error:
        raise FastdiffError(f"{str(file)!r} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
