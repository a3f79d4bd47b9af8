"""The last value, and the polynomial through the last values."""

from __future__ import annotations

from collections.abc import Sequence


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
