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
from .divisors import Divided
from .packing import Tensors
from .recipe import Recipe

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
        moments = self.moments(found, recipe)
        return None if moments is None else lambda weight, own: self.learned(weight, own, moments).tensors()

    def moments(self, found: Found, recipe: Recipe) -> tuple[Tensor, Tensor] | None:
        """Second moments of the layer's inputs, of calls to fit on and calls to judge by; None as above."""
        if not takes(found, recipe):
            return None
        fitted, judged = (_moments(found.layer, half) for half in self.calls.halves())
        return None if fitted is None or judged is None else (fitted, judged)

    def learned(self, weight: Tensor, recipe: Recipe, moments: tuple[Tensor, Tensor]) -> Divided:
        return learned(weight, recipe, *moments, self.steps, self.rate)


def takes(found: Found, recipe: Recipe) -> bool:
    """Whether the layer's weight is stored as integers whose rounding can be learned."""
    return recipe.format in ("int8", "int4") and getattr(found.layer, "groups", 1) == 1


def learned(weight: Tensor, recipe: Recipe, fitted: Tensor, judged: Tensor, steps: int, rate: float) -> Divided:
    """A weight [n, k] that keeps its best rounding; fitted, judged [k, k] are second moments X^T X of inputs."""
    divided = Divided(weight, recipe)

    def loss(values: Tensor, moment: Tensor) -> Tensor:
        off = values - weight
        return ((off @ moment) * off).sum()

    least = float(loss(divided.kept(), judged))
    optimizer = torch.optim.Adam(divided.parameters, lr=divided.rate(rate))
    with torch.enable_grad():
        unit = loss(torch.zeros_like(weight), fitted).clamp_min(1e-12)
        for step in range(steps):
            error = loss(divided.soft(), fitted) / unit
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            if step % 20 == 19 or step == steps - 1:
                judgement = float(loss(divided.now(), judged))
                if judgement < least:
                    least = judgement
                    divided.keep()
    return divided


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
