"""Fits the corrections of quantized layers that a cached value feeds (pipelines/cachequant.py says what they are)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.affine import Affine, AffineFit, corrected
from fastdiff.caching.methods.cachequant import CacheQuant
from fastdiff.clock import StepClock
from fastdiff.config import Config, Resolved
from fastdiff.quant.activations import channels_of, given_to
from fastdiff.quant.layer import QLayer

from .accelerate import Accelerated, put
from .families import Anatomy

Fits = dict[str, dict[int, AffineFit]]


def with_fed_layers(
    pipe: Any, config: Config, found: list[Anatomy], draw: Callable[[Any], None]
) -> Config:  # fmt: skip
    """The config with what one more pass finds for the quantized layers that its cached value feeds.

    draw: runs the pipeline with a handle in place. Nothing changes unless cachequant, with its correction, and a
    quantization are on.
    """
    method = config.cache
    if not isinstance(method, CacheQuant) or not method.correct or config.quant is None or method.plan is None:
        return config
    anatomy = found[0]
    floats = {path: m for path, m in anatomy.denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    handle = Accelerated(pipe, Resolved(config, {}))
    put(handle, found)
    try:
        quantized = {p: m for p, m in anatomy.denoiser.named_modules() if isinstance(m, QLayer) and p in floats}
        fits: Fits = {}
        with _heard(handle.clock, method, anatomy, quantized, floats, fits):
            draw(handle)
    finally:
        handle.restore()
    layers = {path: {step: Affine.of(*fit.solve()) for step, fit in sorted(own.items())} for path, own in fits.items()}
    plan = method.plan.model_copy(update={"layers": layers})
    return config.model_copy(update={"cache": method.model_copy(update={"plan": plan})})


@contextmanager
def _heard(
    clock: StepClock, method: CacheQuant, anatomy: Anatomy, quantized: dict[str, QLayer], floats: dict[str, nn.Module],
    fits: Fits,
) -> Iterator[None]:  # fmt: skip
    """Fits each quantized layer that runs after the cached region at a cached step to its float original, in call
    order; a layer goes on with its corrected output, so that the next one is fitted on what it will be given."""
    computed = set(method.plan.compute if method.plan else ())
    last, served = method.regions(anatomy)[0].units[-1], [False]

    def hook(path: str) -> Callable[..., Tensor | None]:
        def ended(layer: QLayer, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            step = clock.now
            if step is None or step.index in computed or not served[0]:
                return None
            with torch.no_grad():
                truth = floats[path](given_to(args, kwargs))
            axis = channels_of(layer)
            bias: Any = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (-axis - 1))
            fit = fits.setdefault(path, {}).setdefault(step.index, AffineFit(method.ridge, axis))
            fit.add(y - bias, truth - bias)
            return corrected(y - bias, *fit.solve(), axis) + bias

        return ended

    hooks: list[Any] = [layer.register_forward_hook(hook(path), with_kwargs=True) for path, layer in quantized.items()]
    hooks.append(last.register_forward_hook(lambda *_: served.__setitem__(0, True)))
    hooks.append(anatomy.denoiser.register_forward_pre_hook(lambda *_: served.__setitem__(0, False)))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
