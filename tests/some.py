"""Cases of which a few are enough for every day."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """Cases for parametrize: each `every`-th is quick, and the slow tests run them all."""

    def case(number: int, values: Any) -> Any:
        given = values if isinstance(values, tuple) else (values,)
        return pytest.param(*given, marks=() if number % every == 0 else pytest.mark.slow)

    return [case(*numbered) for numbered in enumerate(cases)]
