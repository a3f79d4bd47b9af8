"""FlexRound: Learnable Rounding based on Element-wise Division. Paper: https://arxiv.org/abs/2306.00317 (ICML 2023).

A weight is divided by what is learned for it before it is rounded, so that large ones may move by more than one level;
afterwards only integers and scales are left. As in the paper, divisors are positive, kept as logarithms, and start as
plain rounding; unlike it, the loss is the output error of the layer, whose inputs enter by their second moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import batched, given_to, rows_of
from .build import Found
from .calls import Calls
from .packing import FORMATS, Int4, Int8, Tensors
from .recipe import Recipe
from .rounding import best_scale, in_groups, to_integers

_ROWS = 512  # of each call, for the second moments of convolutions and long sequences


@dataclass(frozen=True)
class FlexRound:
    """Learns the rounding of each layer from calls of the denoiser; layers already quantized are seen as such.

    A rounding is kept only where it lowers the error on calls that it was not learned on.
    """

    calls: Calls
    steps: int = 300
    rate: float = 3e-3  # of 4 bits; higher ones measured worse

    def __call__(self, found: Found, recipe: Recipe) -> Callable[[Tensor, Recipe], Tensors] | None:
        """What makes the stored tensors of the layer's weight; None for formats without integers, grouped convolutions
        and layers that the calls do not run."""
        if recipe.format not in ("int8", "int4") or getattr(found.layer, "groups", 1) > 1:
            return None
        moments = [_moments(found.layer, half) for half in self.calls.halves()]
        if any(moment is None for moment in moments):
            return None
        return lambda weight, own: learn(weight, own, moments[0], moments[1], self.steps, self.rate)  # type: ignore


def learn(weight: Tensor, recipe: Recipe, fitted: Tensor, judged: Tensor, steps: int, rate: float) -> Tensors:
    """Stored tensors of a weight [n, k]; fitted, judged [k, k] are second moments X^T X of inputs."""
    form = FORMATS[recipe.format]
    assert isinstance(form, Int4 | Int8)
    grouped, low, high, start = _start(weight, recipe)
    scale = start.abs().log().clamp_min(-60).requires_grad_()
    sign = torch.where(start < 0, -1.0, 1.0)
    divisor = torch.zeros_like(grouped, requires_grad=True)
    row = torch.zeros(len(grouped), *[1] * (grouped.ndim - 1), device=weight.device, requires_grad=True)

    def stored(scale: Tensor) -> Tensor:
        return sign * (scale.exp().half().float() if isinstance(form, Int4) else scale.exp())

    def integers() -> Tensor:
        return to_integers(grouped, stored(scale) * (divisor + row).exp(), low, high)

    def loss(values: Tensor, moment: Tensor) -> Tensor:
        off = values.flatten(1)[:, : weight.shape[1]] - weight
        return ((off @ moment) * off).sum()

    best = to_integers(grouped, start, low, high), start
    least = float(loss(best[0] * start, judged))
    optimizer = torch.optim.Adam([scale, divisor, row], lr=rate * 7 / high)  # a level of 8 bits is a smaller step
    with torch.enable_grad():
        unit = loss(torch.zeros_like(grouped), fitted).clamp_min(1e-12)
        for step in range(steps):
            divided = grouped / (sign * (scale + divisor + row).exp())
            rounded = (divided + (divided.round() - divided).detach()).clamp(low, high)
            error = loss(rounded * sign * scale.exp(), fitted) / unit
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            if step % 20 == 19 or step == steps - 1:
                with torch.no_grad():
                    found, own = integers(), stored(scale)
                    judgement = float(loss(found * own, judged))
                if judgement < least:
                    best, least = (found, own.clone()), judgement
    return form.store(*best)


def _start(weight: Tensor, recipe: Recipe) -> tuple[Tensor, int, int, Tensor]:
    """The weight in the format's groups, its levels, and the scales of the clipping search."""
    if recipe.format == "int8":
        scale = best_scale(weight, weight.abs().amax(-1, keepdim=True) / 127, -127, 127, "mse")
        return weight, -127, 127, scale.clamp_min(1e-12)
    grouped = in_groups(weight, recipe.group)
    top = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = best_scale(grouped, -top / 8, -8, 7, "mse").half().float()
    return grouped, -8, 7, torch.where(scale == 0, torch.full_like(scale, 2**-14), scale)


def _moments(layer: nn.Linear | nn.Conv2d, calls: Calls) -> Tensor | None:
    """X^T X [k, k] of what the layer is given in these calls, a mean over rows; None if it is given nothing."""
    total: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = _rows(layer, given_to(args, kwargs).detach()).float()
        chosen = rows[torch.randperm(len(rows), generator=generator)[:_ROWS].to(rows.device)]
        total[:] = [(total[0] if total else 0) + chosen.T @ chosen / len(chosen)]

    with layer.register_forward_pre_hook(hook, with_kwargs=True):
        for _ in calls.outputs():
            pass
    return total[0] if total else None


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What each output value is a product of: [m, k]."""
    if isinstance(layer, nn.Linear):
        return rows_of(x, layer)
    patches = F.unfold(batched(x), layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2).flatten(0, 1)
