"""The matrix: every registered cache method, with settings that skip nothing and settings that skip a lot.

A new method fails `test_every_method_has_a_row` until it has a row here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from torch import Tensor

import fastdiff
from fastdiff.caching.plan import Plan, fingerprint
from fastdiff.pipelines.families import anatomies
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


@dataclass(frozen=True)
class PlannedRow:
    """A Row of `dp` on one family: its plan, made when a test asks for it, names the denoiser and the noise levels."""

    name: str
    method = "dp"
    computed = 3
    refusal = ""

    @property
    def families(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def neutral(self) -> dict[str, Any]:
        return {"method": "dp", "plan": _plan_file(self.name, tuple(range(STEPS)))}

    @property
    def aggressive(self) -> dict[str, Any]:
        return {"method": "dp", "plan": _plan_file(self.name, (0, 2, 4))}


@cache
def _plan_folder() -> TemporaryDirectory:
    return TemporaryDirectory()  # removed with the cache, at exit


@cache
def _plan_file(name: str, compute: tuple[int, ...]) -> str:
    """Path of a plan for the standard call of a family."""
    pipe = tiny.make(name)
    with fastdiff.accelerate(pipe) as handle:
        runs: list[Any] = []
        handle.clock.on_start.append(runs.append)
        tiny.run(pipe, name, steps=STEPS)
    plan = Plan(
        denoiser=fingerprint(anatomies(pipe)[0]), scheduler=runs[0].scheduler, sigmas=runs[0].sigmas, compute=compute
    )
    path = Path(_plan_folder().name) / f"{name}-{len(compute)}.json"
    path.write_text(plan.model_dump_json())
    return str(path)


_ALL, _TWO = {"compute_steps": list(range(STEPS))}, {"compute_steps": [0, 3]}
_NO_UNET, _NO_STACK = "is no UNet", "no stack of transformer blocks"
ROWS: dict[str, Row | PlannedRow] = {
    "static": _row("static", _ALL, _TWO, 2),
    "static inner": _row(
        "static", {**_ALL, "site": "inner"}, {**_TWO, "site": "inner", "branch": 2}, 2, UNETS, _NO_UNET
    ),
    "static stack": _row(
        "static", {**_ALL, "site": "stack"}, {**_TWO, "site": "stack"}, 2, TRANSFORMERS, _NO_STACK
    ),
    "deepcache": _row("deepcache", {"interval": 1}, {"interval": 3}, 2, UNETS, _NO_UNET),
    "first_block": _row("first_block", {"threshold": 0}, {"threshold": 1e9}, 1, TRANSFORMERS, _NO_STACK),
    "ab_cache": _row("ab_cache", {"interval": 1}, {"interval": 3, "warmup_steps": 1}, 2),
    **{f"dp {name}": PlannedRow(name) for name in FAMILIES},
}  # fmt: skip

SUPPORTED = [(row, name) for row in ROWS for name in ROWS[row].families]
REFUSED = [(row, name) for row in ROWS for name in FAMILIES if ROWS[row].refusal and name not in ROWS[row].families]


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
