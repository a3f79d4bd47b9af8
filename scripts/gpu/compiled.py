"""Compiled denoisers: the same latents as without, and how many graphs and breaks that takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters

import fastdiff
from tests import tiny

from .bench import Bench, Row, apart, tried

CACHES: dict[str, dict[str, Any] | None] = {
    "no cache": None,
    "ab_cache stack": {"method": "ab_cache", "site": "stack", "interval": 2, "warmup_steps": 2},
    "first_block": {"method": "first_block", "threshold": 1e9, "warmup_steps": 1},
}
MODES = ("default", "reduce-overhead")
SEEDS = (0, 1)


def compiled(bench: Bench) -> Iterator[Row]:
    for scope, mode, (name, cache) in itertools.product(("blocks", "denoiser"), MODES, CACHES.items()):
        if name == "first_block" and scope == "denoiser":  # decides inside
            continue
        if bench.dry and mode != "default":
            continue
        told = {"enabled": True, "scope": scope, "mode": mode} | ({"backend": "eager"} if bench.dry else {})
        yield tried(f"{scope} {mode} {name}", lambda cache=cache, told=told: _compared(bench, cache, told))  # type: ignore[misc]


def _compared(bench: Bench, cache: dict[str, Any] | None, told: dict[str, Any]) -> Row:
    pipe = tiny.make("flux").to(bench.device)
    try:
        with fastdiff.accelerate(pipe, cache=cache):
            wanted = [tiny.run(pipe, "flux", seed=seed) for seed in SEEDS]
        torch._dynamo.reset()
        counters.clear()
        with fastdiff.accelerate(pipe, cache=cache, compile=told) as handle:
            found = [tiny.run(pipe, "flux", seed=seed).clone() for seed in SEEDS]
            notes = handle.report.notes
        error = max(apart(a, b) for a, b in zip(found, wanted, strict=True))
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        return {"error": error, "graphs": graphs, "breaks": breaks, "notes": notes, "passed": error < 1e-3}
    finally:
        pipe.to("cpu")
        torch._dynamo.reset()
