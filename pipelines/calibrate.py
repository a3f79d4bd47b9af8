"""Calibration: run a pipeline uncached, show the cache method what it wants to see, keep what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch

from fastdiff.caching.base import CacheMethod
from fastdiff.caching.calibration import Drawing
from fastdiff.caching.plan import quantization
from fastdiff.caching.protocols import Install
from fastdiff.caching.session import Session
from fastdiff.clock import StepClock
from fastdiff.config import Compile, Config, Resolved
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.patch import PatchSet
from fastdiff.quant.calls import Calls
from fastdiff.recorder import Recorder

from .accelerate import Accelerated, put, restore
from .families import Anatomy, anatomies
from .fed_layers import with_fed_layers

Watch = Callable[[int, int], None]


def calibrate(
    pipe: Any, config: Config, prompts: Sequence[str], *, seed: int = 0, batch: int = 4, watch: Watch | None = None,
    **call: Any,
) -> Config:  # fmt: skip
    """The config with what calibration finds for this pipeline in its cache method.

    Image k is drawn from seed + k, in calls of `batch` with the arguments `call`, with the config's other levers on,
    but not compiled; `watch` is told how many steps of how many are done in the pass under way. An accelerated
    pipeline is restored first.

    Raises BadConfig for a method that takes no plan, a number of computed steps that is not possible, and a solver
    that adds noise of its own, for which no fixed plan can be right.
    """
    method = config.cache
    if not isinstance(method, CacheMethod):
        raise BadConfig("calibrate needs a cache method that takes a plan; add --set cache.method=dp")
    restore(pipe)
    found = anatomies(pipe)
    plain = config.model_copy(update={"cache": None, "compile": Compile()})  # it looks inside what would be compiled

    def draw(install: Install) -> None:
        handle = Observed(pipe, plain, install, found[0])
        put(handle, found)
        try:
            calibrator.weights = quantization(found[0])
            draw_all(handle, prompts, seed, batch, watch, call)
        finally:
            handle.restore()

    calibrator = Drawing(found[0], draw)
    try:
        planned = config.model_copy(update={"cache": method.calibrated(calibrator)})
        return with_fed_layers(pipe, planned, found, lambda handle: draw_all(handle, prompts, seed, batch, watch, call))
    except ValueError as error:
        raise BadConfig(f"{error}; calibrate with a deterministic solver such as DDIM, Euler or DPM++") from None


class Observed(Accelerated):
    """A pipeline whose first denoiser has, in the place of a cache, what a calibration installs."""

    def __init__(self, pipe: Any, config: Config, install: Install, anatomy: Anatomy) -> None:
        self._build, self._anatomy = install, anatomy
        super().__init__(pipe, Resolved(config, {}))

    def _session(self, anatomy: Anatomy, ahead: bool) -> Session | None:
        return self._build(anatomy, self.clock, self._recorder) if anatomy is self._anatomy else None


def hear(
    pipe: Any, prompts: Sequence[str], *, config: Config | None = None, moments: int = 4, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> Calls:  # fmt: skip
    """Calls of the denoiser at `moments` steps spread over runs with these prompts, in every branch.

    The pipeline runs with the levers of `config`, but uncached and uncompiled; one that is accelerated is restored
    first.
    """
    restore(pipe)
    found = anatomies(pipe)
    calls, patches = Calls(found[0], moments), PatchSet()

    def listen(anatomy: Anatomy, clock: StepClock, _: Recorder) -> None:
        calls.listen(clock, patches)

    plain = (config or Config()).model_copy(update={"cache": None, "compile": Compile()})
    handle = Observed(pipe, plain, listen, found[0])
    try:
        put(handle, found)
        try:
            draw_all(handle, prompts, seed, batch, watch, call)
        finally:
            handle.restore()
    finally:
        patches.restore()
    return calls


def draw_all(
    handle: Accelerated, prompts: Sequence[str], seed: int, batch: int, watch: Watch | None, call: dict[str, Any]
) -> None:
    """Draw the prompts in calls of `batch`, image k from seed + k. Raises FastdiffError if no run was complete."""
    pipe, clock, whole = handle.pipe, handle.clock, [0]
    calls, ticks = range(0, len(prompts), batch), count(1)
    clock.on_start.append(lambda run: whole.append(run.total))
    if watch is not None:
        clock.on_tick.append(lambda _: watch(next(ticks), len(calls) * whole[-1]))
    for start in calls:
        texts = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
        try:
            pipe(texts, generator=generators, output_type="latent", **call)
        except ValueError as error:  # how diffusers refuses arguments
            raise BadConfig(f"{type(pipe).__name__} refuses: {str(error).strip().splitlines()[0]}") from error
    if handle.report.steps < max(1, whole[-1]):
        raise FastdiffError(f"{type(pipe).__name__} made no complete denoising run to calibrate on")
