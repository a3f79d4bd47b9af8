"""Weighted sums of remembered tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
