"""How a skipped value is made: fixed weights over the values computed before, on the true grid of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Axis: TypeAlias = Literal["step", "timestep", "sigma", "logsnr"]


def reuse(at: float, anchors: Sequence[float]) -> list[float]:
    """The last computed value."""
    return [0.0] * (len(anchors) - 1) + [1.0]


def adams_bashforth(at: float, anchors: Sequence[float]) -> list[float]:
    """Lagrange weights w_j = prod_{m != j} (s - s_m) / (s_j - s_m): the polynomial through all anchors, at `at`.

    The polynomial an Adams-Bashforth scheme integrates, evaluated instead; exact for degree len(anchors) - 1 on any
    grid (AB-Cache, arXiv 2504.10540, derives the uniform case).
    """
    weights = []
    for j, anchor in enumerate(anchors):
        weight = 1.0
        for m, other in enumerate(anchors):
            if m != j:
                weight *= (at - other) / (anchor - other)
        weights.append(weight)
    return weights


def halfway(at: float, anchors: Sequence[float]) -> list[float]:
    """Between reuse and the polynomial: half of the forecast change, for features that turn (HiCache, 2508.16984, damps
    each order so; exact for constants only)."""
    return [(a + b) / 2 for a, b in zip(reuse(at, anchors), adams_bashforth(at, anchors), strict=True)]


PREDICTORS: dict[str, Callable[[float, Sequence[float]], list[float]]] = {
    "reuse": reuse,
    "adams_bashforth": adams_bashforth,
    # a Taylor forecast whose derivatives are true divided differences is that very polynomial (Newton's form)
    "taylor": adams_bashforth,
    "halfway": halfway,
}


def weights(name: str, order: int, lebesgue_max: float, at: float, anchors: Sequence[float]) -> list[float]:
    """Weights of the newest `order` anchors, as few as keep sum |w| (the Lebesgue constant) within bounds."""
    known = anchors[-order:]
    found = PREDICTORS[name](at, known)
    while len(known) > 1 and sum(map(abs, found)) > lebesgue_max:
        known = known[1:]
        found = PREDICTORS[name](at, known)
    return found


def combine(factors: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Weighted sum in float32, in the dtype of the values; the newest len(factors) values are used. One value with
    factor 1 is returned itself."""
    pairs = [(f, v) for f, v in zip(factors, values[-len(factors) :], strict=True) if f]
    if len(pairs) == 1 and pairs[0][0] == 1.0:
        return pairs[0][1]
    first = pairs[0][1]
    total = first.float() * pairs[0][0] if first.dtype != torch.float64 else first * pairs[0][0]
    for factor, value in pairs[1:]:
        total.add_(value, alpha=factor)
    return total.to(first.dtype)
