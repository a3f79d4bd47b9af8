"""Checks of a module that real processes make, all of one speed in one start; what each rank said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from .ranks import ABSENT, start


class Asked:
    """names: checks by number of ranks; slow: those of them that only the slow tests make."""

    def __init__(
        self, module: ModuleType, names: Mapping[int, Sequence[str]], slow: Mapping[int, Sequence[str]]
    ) -> None:
        self.module, self.names, self.slow = module, names, slow
        self._said = cache(self._start)

    @property
    def cases(self) -> list[Any]:
        """Parameters (ranks, name) of a test of each check."""
        return [
            pytest.param(ranks, name, marks=pytest.mark.slow if self._is_slow(ranks, name) else ())
            for ranks, names in self.names.items()
            for name in names
        ]

    def told(self, ranks: int, name: str) -> list[Any]:
        """What each rank says; a traceback of any fails the test that asks, with those of all: a rank that another
        waited for in vain shows why."""
        found = self._said(self._is_slow(ranks, name))[ranks][name]
        broken = [
            f"rank {rank}: {one}"
            for rank, one in enumerate(found)
            if isinstance(one, str) and ("Traceback" in one or one == ABSENT)
        ]
        assert not broken, "\n".join(broken)
        return found

    def agree(self, ranks: int, name: str) -> None:
        digests = [_digests(one) for one in self.told(ranks, name)]
        assert all(one == digests[0] for one in digests), "the ranks ended with different latents"

    def all_run(self) -> None:
        """No check of the module is left out."""
        found = vars(self.module).items()
        known = {n: v for n, v in found if getattr(v, "__module__", "") == self.module.__name__}
        takes = {n for n, v in known.items() if list(getattr(v, "__annotations__", {}))[:2] == ["rank", "ranks"]}
        assert takes == {name for names in self.names.values() for name in names}

    def _is_slow(self, ranks: int, name: str) -> bool:
        return name in self.slow.get(ranks, ())

    def _start(self, slow: bool) -> dict[int, dict[str, list[Any]]]:
        chosen = {ranks: [n for n in names if self._is_slow(ranks, n) is slow] for ranks, names in self.names.items()}
        kept = {ranks: names for ranks, names in chosen.items() if names}
        return dict(zip(kept, start(self.module.__name__, [(v, k) for k, v in kept.items()]), strict=True))


def _digests(said: Any) -> list[str]:
    if isinstance(said, dict):
        return [said["digest"]] if "digest" in said else [d for one in said.values() for d in _digests(one)]
    return [str(one) for one in said if len(str(one)) == 64] if isinstance(said, list) else []
