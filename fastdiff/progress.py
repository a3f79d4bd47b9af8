"""A progress bar that tells when its loop is left, and is told what to show behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class WatchedBar:
    """Tells when its loop is left, however that happens. `said`: a text for its end, or nothing."""

    def __init__(self, bar: Any, left: Callable[[], None], said: Callable[[], str]) -> None:
        self._bar, self._left, self._said = bar, left, said

    def __enter__(self) -> WatchedBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        self._left()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._bar:
                yield item
                self._show()
        finally:
            self._left()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._show()
        return self._bar.update(*args, **kwargs)

    def _show(self) -> None:
        if hasattr(self._bar, "set_postfix_str") and (text := self._said()):
            self._bar.set_postfix_str(text, refresh=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
