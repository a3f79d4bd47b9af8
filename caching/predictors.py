"""How a skipped value is made: fixed weights over the values computed before, on the true grid of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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


PREDICTORS: dict[str, Callable[[float, Sequence[float]], list[float]]] = {
    "reuse": reuse,
    "adams_bashforth": adams_bashforth,
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
    """Weighted sum in float32, in the dtype of the values; the newest len(factors) values are used."""
    pairs = [(f, v) for f, v in zip(factors, values[-len(factors) :], strict=True) if f]
    if len(pairs) == 1 and pairs[0][0] == 1.0:
        return pairs[0][1].clone()
    total = torch.zeros_like(pairs[0][1], dtype=torch.float32)
    for factor, value in pairs:
        total.add_(value, alpha=factor)
    return total.to(pairs[0][1].dtype)
