"""Calibration: run a pipeline uncached, keep its trace, plan the steps to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdiff.caching.dp import DP, Plan, fingerprint
from fastdiff.caching.schedule import Costs, optimal_steps
from fastdiff.caching.trace import Trace, influence
from fastdiff.errors import BadConfig

from .accelerate import accelerate
from .families import anatomies


def record(pipe: Any, prompts: Sequence[str], seed: int = 0, batch: int = 4, **call: Any) -> tuple[Trace, Any]:
    """Uncached runs of the prompts, image k from seed + k; returns the trace and the influence of each step.

    Raises BadConfig where the solver adds noise of its own: no fixed plan can be right there.
    """
    with accelerate(pipe) as handle:
        trace = Trace(handle.clock)
        for start in range(0, len(prompts), batch):
            texts = list(prompts[start : start + batch])
            generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
            pipe(texts, generator=generators, output_type="latent", **call)
        if trace.run is None or trace.gram is None:
            raise BadConfig(f"{type(pipe).__name__} made no complete denoising run to calibrate on")
        try:
            return trace, influence(pipe.scheduler, trace.run)
        except ValueError as error:
            raise BadConfig(f"{error}; calibrate with a deterministic solver such as DDIM, Euler or DPM++") from None


def plan_steps(method: DP, pipe: Any, trace: Trace, moves: np.ndarray, guidance_scale: float | None) -> DP:
    """The method with the plan of least predicted error for its number of computed steps."""
    assert trace.run is not None and trace.gram is not None
    run = trace.run
    forced = [*range(max(1, method.warmup_steps)), *range(run.total - method.cooldown_steps, run.total)]
    costs = Costs(
        trace.gram, run.coordinates(method.coordinate), moves,
        lebesgue_max=method.lebesgue_max, ridge=method.ridge, longest=method.longest,
    )  # fmt: skip
    try:
        steps = optimal_steps(costs.table(), method.computed_steps, forced)
    except ValueError as error:
        raise BadConfig(f"computed_steps = {method.computed_steps} of {run.total}: {error}") from None
    return method.model_copy(
        update={
            "plan": Plan(
                denoiser=fingerprint(anatomies(pipe)[0]),
                scheduler=type(pipe.scheduler).__name__,
                guidance_scale=guidance_scale,
                sigmas=run.sigmas,
                compute=tuple(steps),
                weights=_weights(costs, steps),
            )
        }
    )


def _weights(costs: Costs, steps: Sequence[int]) -> dict[int, tuple[tuple[int, float], ...]]:
    ends: list[int] = [*steps[1:], costs.total]
    found = {}
    for k, (step, end) in enumerate(zip(steps, ends, strict=True)):
        previous = steps[k - 1] if k else step
        for at, anchors, values in costs.predictions(previous, step, end):
            found[at] = tuple((int(a), float(w)) for a, w in zip(anchors, values, strict=True))
    return found
