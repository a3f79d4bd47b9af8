"""Calibration: run a pipeline uncached, keep its trace, plan the steps to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from fastdiff.caching.dp import DP
from fastdiff.caching.trace import Trace
from fastdiff.clock import Run
from fastdiff.config import Config
from fastdiff.errors import BadConfig, FastdiffError

from .accelerate import accelerate
from .families import anatomies

Watch = Callable[[int, int], None]


def calibrate(
    pipe: Any, config: Config, prompts: Sequence[str], *, seed: int = 0, batch: int = 4, watch: Watch | None = None,
    **call: Any,
) -> Config:  # fmt: skip
    """The config with a plan for this pipeline in its cache method, `dp`.

    Image k is drawn from seed + k, in calls of `batch` with the arguments `call`, with the config's other levers on;
    `watch` is told how many steps of how many are done. An accelerated pipeline is restored first.

    Raises BadConfig for a method that takes no plan, a number of computed steps that is not possible, and a solver
    that adds noise of its own, for which no fixed plan can be right.
    """
    method = config.cache
    if not isinstance(method, DP):
        named = f"not {method.method}" if method is not None else "and no cache method is set"
        raise BadConfig(f'calibrate makes plans for the cache method dp, {named}; add --set cache.method="dp"')
    trace = record(pipe, prompts, config, seed=seed, batch=batch, check=method.check, watch=watch, **call)
    try:
        return config.model_copy(update={"cache": method.planned(trace, anatomies(pipe)[0])})
    except ValueError as error:
        raise BadConfig(f"{error}; calibrate with a deterministic solver such as DDIM, Euler or DPM++") from None


def record(
    pipe: Any, prompts: Sequence[str], config: Config | None = None, *, seed: int = 0, batch: int = 4,
    check: Callable[[Run], None] | None = None, watch: Watch | None = None, **call: Any,
) -> Trace:  # fmt: skip
    """The trace of uncached runs of the prompts; `check` may refuse a run when it starts."""
    with accelerate(pipe, (config or Config()).model_copy(update={"cache": None})) as handle:
        trace = Trace(handle.clock)
        handle.clock.on_start.extend([check] if check else [])
        calls, ticks = range(0, len(prompts), batch), count(1)
        if watch is not None:
            handle.clock.on_tick.append(
                lambda _: watch(next(ticks), len(calls) * (trace.run.total if trace.run else 0))
            )
        for start in calls:
            texts = list(prompts[start : start + batch])
            generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
            try:
                pipe(texts, generator=generators, output_type="latent", **call)
            except ValueError as error:  # how diffusers refuses arguments
                raise BadConfig(f"{type(pipe).__name__} refuses: {str(error).strip().splitlines()[0]}") from error
    if trace.gram is None:
        raise FastdiffError(f"{type(pipe).__name__} made no complete denoising run to calibrate on")
    if not np.isfinite(trace.gram).all():
        raise FastdiffError("the model's outputs are not finite numbers; try another dtype or guidance scale")
    return trace
