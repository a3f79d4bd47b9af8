"""Calibration: static ranges of the activations of a live pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from fastdiff.config import Config, Resolved
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import chosen
from fastdiff.quant.calibration import Calibration, Origin
from fastdiff.quant.halves import halves
from fastdiff.quant.observe import Observer, edges_of

from .accelerate import Accelerated, put, restore
from .calibrate import Watch, draw_all
from .families import Anatomy, anatomies
from .quantizing import methods_of, print_of, targets


def calibrate_ranges(
    pipe: Any, method: QuantMethod, prompts: Sequence[str], *, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> Calibration:  # fmt: skip
    """Static ranges of the activations of a float pipeline, by noise level and over both branches of guidance.

    Draws the prompts, image k from seed + k, with the arguments `call`, among them images and control maps; with
    `corrupt=True` among them noise is mixed into those. One pass; an accelerated pipeline is restored first.
    """
    restore(pipe)
    found = anatomies(pipe)
    parts = targets(pipe, method, found)
    methods = methods_of(method, parts, found)
    kept, count = method.timestep_buckets, method.observer == "percentile"
    seen = {
        name: Observer([layer for layer, _ in chosen(methods[name], part)], kept, count)
        for name, part in parts.items()
        if name in methods
    }
    handle = Accelerated(pipe, Resolved(Config(), {}))
    put(handle, found)
    with handle, ExitStack() as stack:
        for name, observer in seen.items():
            observer.listen(handle.clock)
            timed = parts[name] if any(a.component == name for a in found) else None
            stack.enter_context(observer.watching(timed))
        draw_all(handle, prompts, seed, batch, watch, call)
    return _found(method, parts, seen, found, len(prompts))


def _found(
    method: QuantMethod, parts: dict[str, nn.Module], seen: dict[str, Observer], found: list[Anatomy], prompts: int
) -> Calibration:
    run = next(observer.run for observer in seen.values() if observer.run is not None)
    joined = {anatomy.component: halves(anatomy) for anatomy in found}
    times = {time: share for observer in seen.values() for time, share in observer.times.items()}
    origin = Origin(
        components={name: print_of(name, parts[name]) for name in seen},
        edges=tuple(edges_of(run, method.timestep_buckets)), buckets=method.timestep_buckets,
        times=tuple(sorted(times.items())), scheduler=run.scheduler, steps=run.total,
        guidance_scale=run.guidance_scale, prompts=prompts, smooth=method.smooth, split=method.split,
    )  # fmt: skip
    return Calibration(origin, {name: observer.ranges(method, joined.get(name, {})) for name, observer in seen.items()})
