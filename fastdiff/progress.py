"""A progress bar that tells when its loop is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class WatchedBar:
    """A progress bar that tells when its loop is left, however that happens."""

    def __init__(self, bar: Any, left: Callable[[], None]) -> None:
        self._bar, self._left = bar, left

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._left()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._left()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
