"""Quantization for good: calibrate on runs of the pipeline, put integers in the place of weights, let the floats go.

`accelerate(pipe, quant=...)` keeps the float layers for restore(); here they are freed, and the pipeline can be saved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastdiff.config import Source
from fastdiff.quant.activations import Present
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import build, chosen
from fastdiff.quant.calibration import Calibration
from fastdiff.quant.calls import Calls, swapped
from fastdiff.quant.install import QuantReport
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.pruning import within
from fastdiff.quant.timed import seconds

from . import quantizing
from .accelerate import restore
from .calibrate import Watch
from .conditions import theirs
from .families import anatomies
from .hearing import hear_each
from .loading import embedded_name
from .planning import learned_by, with_plans
from .quantizing import methods_of, quantize_for_good, targets
from .ranges import calibrate_ranges


def method_of(pipe: Any, config: Source) -> QuantMethod:
    """The quant method of a config, or of a method's name. Raises BadConfig where there is none."""
    return quantizing.method_of(config, anatomies(pipe)[0].family, embedded_name(pipe))


def quantize(
    pipe: Any, config: Source, prompts: Sequence[str] = (), *, seed: int = 0, batch: int = 4,
    calibration: Calibration | None = None, predict: bool = False, compiled: bool = False, watch: Watch | None = None,
    **call: Any,
) -> QuantReport:  # fmt: skip
    """Quantize a pipeline for good; its float weights are freed, and `save` writes it.

    config: name of a method, or anything that `accelerate` takes, with a `quant`. With `prompts` the ranges of 8-bit
    activations are calibrated (unless given), and the error of the denoiser's output and its time are measured; without
    any, ranges are dynamic. `predict` measures each layer alone too, a call of the denoiser for each, for what a linear
    model predicts of that error; `compiled` times the float denoiser under torch.compile too. Arguments `call` are the
    pipeline's; `corrupt=True` among them mixes noise into its pictures, by which a model learns to bear worse ones.

    Raises BadConfig, UnsupportedModel or BackendUnavailable; the pipeline is then as it was.
    """
    started, method = time.perf_counter(), method_of(pipe, config)
    restore(pipe)
    found = anatomies(pipe)
    parts = targets(pipe, method, found)  # before anything is drawn
    dynamic = method.activations != "int8" or method.ranges is not None
    if calibration is None and prompts and not dynamic:
        calibration = calibrate_ranges(pipe, method, prompts, seed=seed, batch=batch, watch=watch, **call)
    first = theirs(call, len(prompts), slice(batch))
    heard = hear_each(pipe, prompts[:batch], moments=4, seed=seed, batch=batch, **first) if prompts else None
    method = with_plans(method, heard, watch)
    learned = learned_by(method, heard)
    methods = methods_of(method, parts, found)
    measured = {name: calls for name, calls in (heard or {}).items() if calls.given}
    begun = time.perf_counter()
    predicted = {
        name: _predicted(methods[name], calls, calibration)
        for name, calls in measured.items()
        if predict and name in methods
    }
    predicting = time.perf_counter() - begun if predicted else None
    before = _times(measured, compiled)
    done = quantize_for_good(pipe, method, found, calibration=calibration, learned=learned)
    _measure(done.report, measured, predicted, before)
    done.report.predict_seconds, done.report.seconds = predicting, time.perf_counter() - started
    done.report.notes = [*done.notes(freed=True), *done.timed()]
    done.report.timed = {key: ms for present in done.presents.values() for key, ms in present.times.items()}
    return done.report


def _measure(
    report: QuantReport, heard: Mapping[str, Calls], predicted: Mapping[str, float], before: tuple[Any, Any]
) -> None:  # fmt: skip
    """The errors of the denoiser that is off most, and the times of the first."""
    errors = {name: calls.error() ** 0.5 for name, calls in heard.items()}
    if not errors:
        return
    worst = max(errors, key=lambda name: errors[name])
    report.output_error, report.predicted_error = errors[worst], predicted.get(worst)
    report.float_ms, report.compiled_ms = before
    report.quantized_ms, _ = _times(heard, compiled=False)


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


def _times(heard: Mapping[str, Calls], compiled: bool) -> tuple[float | None, float | None]:
    """Milliseconds of a call of the first denoiser, as it is and, if wanted, under torch.compile."""
    if not heard:
        return None, None
    calls = next(iter(heard.values()))
    plain, denoiser = _milliseconds(calls), calls.anatomy.denoiser
    if not compiled:
        return plain, None
    denoiser.compile()
    try:
        return plain, _milliseconds(calls)
    finally:
        denoiser._compiled_call_impl = None


def _milliseconds(calls: Calls) -> float:
    """The fastest call of three passes over them: others may hold the machine for most of the time."""
    passes = (calls.outputs() for _ in range(3))
    return 1000 * min(seconds(partial(next, outputs), t.device) for outputs in passes for t in calls.truth)
