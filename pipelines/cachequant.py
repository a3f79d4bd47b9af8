"""Caching and quantization together: the second half of CacheQuant's correction (https://arxiv.org/abs/2503.01323).

The first half corrects a cached value, on the input side. This one corrects, channel by channel and cached step by
step, the outputs of the quantized layers that the value feeds, to what the float layers would have made of the same
input. Fits are of outputs without bias, so that a scale of the weights and a new bias are all it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from fastdiff.affine import corrected
from fastdiff.caching.methods.cachequant import CacheQuant
from fastdiff.caching.session import Session
from fastdiff.clock import StepClock
from fastdiff.patch import PatchSet
from fastdiff.quant.activations import channels_of
from fastdiff.quant.layer import QLayer

from .families import Anatomy


def correct_fed_layers(
    session: Session, method: CacheQuant, anatomy: Anatomy, clock: StepClock, patches: PatchSet
) -> None:  # fmt: skip
    """Install what the plan says of quantized layers; without quantization, or while a plan is made, nothing.

    A step that a guard computes has nothing to correct.
    """
    if not method.correct or method.plan is None:
        return
    for path, table in method.found.layers.items():
        layer = anatomy.denoiser.get_submodule(path)
        if isinstance(layer, QLayer):
            _correct(layer, {step: pair.tensors() for step, pair in table.items()}, session, method, clock, patches)


def _correct(
    layer: QLayer, table: dict[int, tuple[Tensor, Tensor]], session: Session, method: CacheQuant, clock: StepClock,
    patches: PatchSet,
) -> None:  # fmt: skip
    folded: dict[int, tuple[Tensor, Tensor]] = {}

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def fed(*args: Any, **kwargs: Any) -> Tensor:
            y = forward(*args, **kwargs)
            step = clock.now
            planned = step is not None and step.index in table and method.found.fits(step.run)
            if step is None or not planned or not session.skipping(0):
                return y
            if step.index not in folded:
                scale, shift = (t.to(y.device) for t in table[step.index])
                bias = 0 if layer.bias is None else layer.bias.to(y.device)
                folded[step.index] = scale, shift + (1 - scale) * bias
            return corrected(y, *folded[step.index], channels_of(layer))

        return fed

    patches.wrap_forward(layer, wrapper)
