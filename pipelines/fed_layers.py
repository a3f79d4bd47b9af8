"""Fits the corrections of quantized layers that a cached value feeds (pipelines/cachequant.py says what they are)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.affine import Affine, AffineFit, corrected
from fastdiff.caching.methods.cachequant import CacheQuant, Corrected
from fastdiff.clock import StepClock
from fastdiff.config import Config, Resolved
from fastdiff.plans import Each
from fastdiff.quant.activations import channels_of, given_to
from fastdiff.quant.layer import QLayer

from .accelerate import Accelerated, put
from .families import Anatomy

Fits = dict[str, dict[int, AffineFit]]


def with_fed_layers(
    pipe: Any, config: Config, found: list[Anatomy], draw: Callable[[Any], None]
) -> Config:  # fmt: skip
    """The config with what one more pass finds for the quantized layers that its cached values feed.

    draw: runs the pipeline with a handle in place. Nothing changes unless cachequant, with its correction, and a
    quantization are on.
    """
    method = config.cache
    if not isinstance(method, CacheQuant) or not method.correct or config.quant is None:
        return config
    floats = {
        anatomy.component: {p: m for p, m in anatomy.denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
        for anatomy in found
    }
    handle = Accelerated(pipe, Resolved(config, {}))
    put(handle, found)
    plans: dict[str, Corrected] = {}
    with handle, ExitStack() as stack:
        fits: dict[str, Fits] = {}
        for anatomy in found:
            own = method.of(anatomy.component, anatomy is found[0])
            if isinstance(own, CacheQuant):
                plans[anatomy.component], fits[anatomy.component] = own.found, {}
                heard = _heard(handle.clock, own, anatomy, floats[anatomy.component], fits[anatomy.component])
                stack.enter_context(heard)
        draw(handle)
    plans = {name: plan.model_copy(update={"layers": _solved(fits[name])}) for name, plan in plans.items()}
    plan = Each[Corrected](plans) if isinstance(method.plan, Each) else plans[found[0].component]
    return config.model_copy(update={"cache": method.with_plan(plan)})


def _solved(fits: Fits) -> dict[str, dict[int, Affine]]:
    return {path: {step: Affine.of(*fit.solve()) for step, fit in sorted(own.items())} for path, own in fits.items()}


@contextmanager
def _heard(
    clock: StepClock, method: CacheQuant, anatomy: Anatomy, floats: dict[str, nn.Module], fits: Fits
) -> Iterator[None]:  # fmt: skip
    """Fits each quantized layer that runs after the cached region at a cached step to its float original, in call
    order; a layer goes on with its corrected output, so that the next one is fitted on what it will be given."""
    computed, modules = set(method.found.compute), anatomy.denoiser.named_modules()
    quantized = {path: m for path, m in modules if isinstance(m, QLayer) and path in floats}
    last, served = method.region(anatomy).units[-1], [False]

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

    with ExitStack() as hooks:
        for path, layer in quantized.items():
            hooks.enter_context(layer.register_forward_hook(hook(path), with_kwargs=True))
        hooks.enter_context(last.register_forward_hook(lambda *_: served.__setitem__(0, True)))
        hooks.enter_context(anatomy.denoiser.register_forward_pre_hook(lambda *_: served.__setitem__(0, False)))
        yield
