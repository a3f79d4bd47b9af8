"""What caches would hold of a picture, counted on its first step instead of found out when memory is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.session import Session
from fastdiff.clock import Run, Step, StepClock
from fastdiff.patch import PatchSet
from fastdiff.pipelines.accelerate import resolve_for
from fastdiff.pipelines.plan import observe
from fastdiff.recorder import Recorder

STEPS = 1000  # of the run that is looked at: more than the values that any method reads


def cache_bytes(pipe: Any, names: Sequence[str], size: int | None = None) -> dict[str, int]:
    """Bytes by the name of a cache method, of the first denoiser; size: pixels of a square picture's side.

    Raises BadConfig or UnsupportedModel for a method that needs a plan, or cannot work on this model.
    """
    if not names:
        return {}
    anatomy, calls, _ = observe(pipe, size)
    methods: dict[str, Any] = {name: resolve_for(pipe, None, {"cache": name}, anatomy).config.cache for name in names}
    return {name: first_step(method, anatomy, calls)[1] for name, method in methods.items()}


def first_step(method: CacheMethod, anatomy: Anatomy, calls: Sequence[Any], steps: int = STEPS) -> tuple[int, int]:
    """Bytes that a method holds after the first step of a run, and those it will hold at most.

    calls: the arguments of the denoiser's calls in a step; on the meta device nothing is computed.
    """
    clock = StepClock(None)
    times = tuple(map(float, range(steps, 0, -1)))
    clock.run = Run(1, times, times, False)
    recorder = Recorder(clock)
    with PatchSet() as patches, torch.no_grad():
        session = Session(method, anatomy, clock, recorder)
        session.attach(patches)
        session.attach_denoiser(patches)
        for started in clock.on_start:
            started(clock.run)
        for branch, (args, kwargs) in enumerate(calls):
            clock.now = Step(clock.run, 0, branch)
            anatomy.denoiser(*args, **kwargs)
        held = round(recorder.report.cache_mb * 1e6), session.holding.foreseen
        patches.restore()
    return held
