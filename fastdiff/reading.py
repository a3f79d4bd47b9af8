"""Pictures in files that may be anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .errors import FastdiffError


@contextmanager
def reading(path: Path, *formats: str) -> Iterator[Image.Image]:
    """The picture in a file. Raises FastdiffError, in a sentence, for what is none, or none of these formats."""
    try:
        with Image.open(path, formats=formats or None) as image:
            yield image
    except FileNotFoundError:
        raise FastdiffError(f"{str(path)!r} does not exist") from None
    except Image.UnidentifiedImageError:
        kind = f"{formats[0]} file" if formats else "picture"
        raise FastdiffError(f"{str(path)!r} is not a {kind}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FastdiffError(f"{str(path)!r} cannot be read: {error}") from None
