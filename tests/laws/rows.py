"""The matrix: every registered cache method, with settings that skip nothing and settings that skip a lot.

A new method fails `test_every_method_has_a_row` until it has a row here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from torch import Tensor

import fastdiff
from tests import tiny
from tests.tiny import FAMILIES, TRANSFORMERS, UNETS

STEPS = 6


@dataclass(frozen=True)
class Row:
    """neutral and aggressive settings of a method, the steps of STEPS that the aggressive ones compute, and where it
    works; `refusal` is part of what it says elsewhere."""

    neutral: dict[str, Any]
    aggressive: dict[str, Any]
    computed: int
    families: tuple[str, ...] = FAMILIES
    refusal: str = ""

    @property
    def method(self) -> str:
        return self.aggressive["method"]


def _row(method: str, neutral: dict[str, Any], aggressive: dict[str, Any], computed: int, *where: Any) -> Row:
    return Row({"method": method, **neutral}, {"method": method, **aggressive}, computed, *where)


_ALL, _TWO = {"compute_steps": list(range(STEPS))}, {"compute_steps": [0, 3]}
_NO_UNET, _NO_STACK = "is no UNet", "no stack of transformer blocks"
ROWS = {
    "static": _row("static", _ALL, _TWO, 2),
    "static inner": _row(
        "static", {**_ALL, "site": "inner"}, {**_TWO, "site": "inner", "branch": 2}, 2, UNETS, _NO_UNET
    ),
    "static stack": _row(
        "static", {**_ALL, "site": "stack"}, {**_TWO, "site": "stack"}, 2, TRANSFORMERS, _NO_STACK
    ),
    "deepcache": _row("deepcache", {"interval": 1}, {"interval": 3}, 2, UNETS, _NO_UNET),
    "first_block": _row("first_block", {"threshold": 0}, {"threshold": 1e9}, 1, TRANSFORMERS, _NO_STACK),
    "ab_cache": _row("ab_cache", {"interval": 1}, {"interval": 2, "warmup_steps": 2}, 4),
}  # fmt: skip

SUPPORTED = [(row, name) for row in ROWS for name in ROWS[row].families]
REFUSED = [(row, name) for row in ROWS for name in FAMILIES if name not in ROWS[row].families]


def each(pairs: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrize a test over (row, family) pairs, with readable ids."""
    pairs = list(pairs)
    return pytest.mark.parametrize(("row", "name"), pairs, ids=[f"{row}-{name}" for row, name in pairs])


@cache
def plain(name: str) -> Tensor:
    """What plain diffusers makes of the standard call."""
    return tiny.run(tiny.make(name), name, steps=STEPS)


@cache
def cached_afresh(row: str, name: str) -> Tensor:
    """What the aggressive settings make of the standard call in a fresh pipeline."""
    return fresh(row, name)


def fresh(row: str, name: str, scheduler: Any = None, **overrides: Any) -> Tensor:
    """One accelerated call of a pipeline that has never run."""
    pipe = tiny.make(name)
    if scheduler is not None:
        pipe.scheduler = scheduler
    accelerate(pipe, row)
    return tiny.run(pipe, name, **({"steps": STEPS} | overrides))


def accelerate(pipe: DiffusionPipeline, row: str) -> fastdiff.Accelerated:
    """With the aggressive settings."""
    return fastdiff.accelerate(pipe, cache=ROWS[row].aggressive)
