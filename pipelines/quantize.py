"""Quantization for good: calibrate on runs of the pipeline, put integers in the place of weights, let the floats go.

`accelerate(pipe, quant=...)` keeps the float layers for restore(); here they are freed, and the pipeline can be saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastdiff.config import Config, Resolved, Source, layers_of, resolve
from fastdiff.errors import BadConfig
from fastdiff.patch import PatchSet
from fastdiff.quant.activations import Present
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import build, chosen
from fastdiff.quant.calibration import Calibration, Origin
from fastdiff.quant.calls import Calls, swapped
from fastdiff.quant.flexround import FlexRound
from fastdiff.quant.halves import halves
from fastdiff.quant.install import QuantReport
from fastdiff.quant.observe import Observer, edges_of
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.pruning import prune, within
from fastdiff.quant.schemes.mixed import BitPlan, Mixed
from fastdiff.quant.standing import Standing

from .accelerate import Accelerated, put, restore
from .calibrate import Watch, draw_all, hear
from .conditions import corrupted
from .families import Anatomy, anatomies
from .loading import embedded_name
from .quantizing import print_of, quantize_parts, targets


def method_of(pipe: Any, config: Source) -> QuantMethod:
    """The quant method of a config, or of a method's name. Raises BadConfig where there is none."""
    if isinstance(config, str) and not config.endswith((".toml", ".json")):
        config = {"quant": config}
    method = resolve(layers_of(config), anatomies(pipe)[0].family, embedded_name(pipe)).config.quant
    if not isinstance(method, QuantMethod):
        raise BadConfig("the config has no [quant] with a method; add --set quant.method=w8a8")
    return method


def calibrate_ranges(
    pipe: Any, method: QuantMethod, prompts: Sequence[str], *, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, corrupt: bool = False, **call: Any,
) -> Calibration:  # fmt: skip
    """Static ranges of the activations of a float pipeline, by noise level and over both branches of guidance.

    Draws the prompts, image k from seed + k, with the arguments `call`, among them images and control maps; `corrupt`
    mixes noise into those. One pass; an accelerated pipeline is restored first.
    """
    restore(pipe)
    found = anatomies(pipe)
    parts = targets(pipe, method, found)
    seen = {
        name: Observer([layer for layer, _ in chosen(method, part)], method.timestep_buckets)
        for name, part in parts.items()
    }
    handle = Accelerated(pipe, Resolved(Config(), {}))
    put(handle, found)
    try:
        with ExitStack() as stack:
            for name, observer in seen.items():
                observer.listen(handle.clock)
                timed = parts[name] if any(a.component == name for a in found) else None
                stack.enter_context(observer.watching(timed))
            draw_all(handle, prompts, seed, batch, watch, corrupted(call, seed) if corrupt else call)
    finally:
        handle.restore()
    return _found(method, parts, seen, found, len(prompts))


def _found(
    method: QuantMethod, parts: dict[str, nn.Module], seen: dict[str, Observer], found: list[Anatomy], prompts: int
) -> Calibration:
    run = next(observer.run for observer in seen.values() if observer.run is not None)
    joined = {anatomy.component: halves(anatomy) for anatomy in found}
    times = {time: share for observer in seen.values() for time, share in observer.times.items()}
    origin = Origin(
        components={name: print_of(name, part) for name, part in parts.items()},
        edges=tuple(edges_of(run, method.timestep_buckets)), buckets=method.timestep_buckets,
        times=tuple(sorted(times.items())), scheduler=run.scheduler, steps=run.total,
        guidance_scale=run.guidance_scale, prompts=prompts, smooth=method.smooth, split=method.split,
    )  # fmt: skip
    return Calibration(origin, {name: observer.ranges(method, joined.get(name, {})) for name, observer in seen.items()})


def quantize(
    pipe: Any, config: Source, prompts: Sequence[str] = (), *, seed: int = 0, batch: int = 4, corrupt: bool = False,
    calibration: Calibration | None = None, predict: bool = True, compiled: bool = False, watch: Watch | None = None,
    **call: Any,
) -> QuantReport:  # fmt: skip
    """Quantize a pipeline for good; its float weights are freed, and `save` writes it.

    config: name of a method, or anything that `accelerate` takes, with a `quant`. With `prompts` the ranges of 8-bit
    activations are calibrated (unless given), and the error of the denoiser's output and its time are measured; without
    any, ranges are dynamic. `predict` measures each layer alone too, on one call, for what a linear model predicts of
    that error; `compiled` times the float denoiser under torch.compile too. Arguments `call` are the pipeline's.

    Raises BadConfig, UnsupportedModel or BackendUnavailable; the pipeline is then as it was.
    """
    method = method_of(pipe, config)
    restore(pipe)
    found = anatomies(pipe)
    parts = targets(pipe, method, found)  # before anything is drawn
    dynamic = method.activations != "int8" or method.ranges is not None
    if calibration is None and prompts and not dynamic:
        calibration = calibrate_ranges(
            pipe, method, prompts, seed=seed, batch=batch, watch=watch, corrupt=corrupt, **call
        )
    calls = hear(pipe, prompts[:batch], moments=4, seed=seed, batch=batch, **call) if prompts else None
    method = _planned(method, found[0], calls, watch)
    learned = learned_by(method, calls)
    if calls is not None:
        float_ms, compiled_ms = _milliseconds(calls), _compiled_ms(calls) if compiled else None
        predicted = _predicted(method, calls, calibration) if predict and found[0].component in parts else None
    with PatchSet() as patches:
        done = quantize_parts(pipe, method, found, patches.replace, calibration=calibration, learned=learned)
    for name, present in done.presents.items():
        origin = done.calibration.origin if done.calibration else None
        Standing(method.model_dump(mode="json"), present, origin).attach(parts[name])
    report = done.report
    if calls is not None:
        report.output_error, report.predicted_error = calls.error() ** 0.5, predicted
        report.float_ms, report.compiled_ms, report.quantized_ms = float_ms, compiled_ms, _milliseconds(calls)
    report.notes = done.notes(freed=True)
    return report


def _predicted(method: QuantMethod, calls: Calls, calibration: Calibration | None) -> float:
    """The error of the output if those of the denoiser's layers, each quantized alone, sum up (HIGGS,
    https://arxiv.org/abs/2411.17525), and what was removed. On the call in the middle."""
    anatomy, some = calls.anatomy, calls.only([len(calls.given) // 2])
    gone = method.prune if isinstance(method.prune, PrunePlan) else PrunePlan(denoiser="")
    ranges = calibration.of(anatomy.component) if calibration else {}
    total, removed = gone.error, [removal.path for removal in gone.removed]
    for found, recipe in chosen(method, anatomy.denoiser):
        if not within(found.name, removed):
            known: dict[str, Any] = ranges.get(found.name, {}) if recipe.activations == "int8" else {}
            with swapped(anatomy.denoiser, {found.name: build(found.layer, recipe, Present(), **known)}):
                total += some.error()
    return total**0.5


def _compiled_ms(calls: Calls) -> float:
    denoiser = calls.anatomy.denoiser
    denoiser.compile()
    try:
        return _milliseconds(calls)
    finally:
        denoiser._compiled_call_impl = None


def plan(
    pipe: Any, method: QuantMethod, prompts: Sequence[str], *, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> BitPlan | PrunePlan:  # fmt: skip
    """What `quantize` plans before it begins: what `prune`, a number, removes, or the bits of `mixed`.

    Raises BadConfig for a method that plans nothing.
    """
    if not (isinstance(method.prune, float) or (isinstance(method, Mixed) and method.plan is None)):
        raise BadConfig("there is nothing to plan: set quant.prune to an error, 0.03 say, or quant.method to mixed")
    calls = hear(pipe, prompts, moments=4, seed=seed, batch=batch, **call)
    planned = _planned(method, anatomies(pipe)[0], calls, watch)
    found: Any = planned.plan if isinstance(planned, Mixed) else planned.prune
    return found


def _planned(method: QuantMethod, anatomy: Anatomy, calls: Calls | None, watch: Watch | None) -> QuantMethod:
    """The method with the plan that it leaves to be made on calls of the denoiser: of bits, or of what to remove."""
    if isinstance(method, Mixed) and method.plan is None:
        if calls is None:
            raise BadConfig("mixed measures the denoiser's layers: give prompts, or a plan of bits as quant.plan")
        return method.planned(anatomy, calls, watch)
    if isinstance(method.prune, float):
        if calls is None:
            raise BadConfig(f"quant.prune = {method.prune:g} measures the denoiser: give prompts, or a plan")
        found = prune(anatomy, calls, max_error=method.prune**2, watch=watch)
        return method.model_copy(update={"prune": found})
    return method


def learned_by(method: QuantMethod, calls: Calls | None) -> Callable[..., Any] | None:
    """What learns the rounding of a layer's weight from calls of the denoiser, if the method wants that."""
    if method.rounding != "flexround":
        return None
    if calls is None or method.smooth is not None or method.split or method.components != ("denoiser",):
        raise BadConfig(
            "rounding = flexround learns from calls of the denoiser: give prompts, and leave out smooth, split and "
            "other components; or take rounding = mse"
        )
    return FlexRound(calls)


def _milliseconds(calls: Calls) -> float:
    """The fastest call of three passes over them: others may hold the machine for most of the time."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _output in calls.outputs():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            start = time.perf_counter()
    return 1000 * best
