"""Weights [n, k] as integers: groups, rounding, the search of a scale, two numbers in a byte.

p = 2.4 of the clipping search is that of https://arxiv.org/abs/2503.01323.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "mse", "flexround"]

_SHRINK = torch.linspace(1.0, 0.5, 21)  # of the range, tried by rounding = "mse"


def group_of(inputs: int, group: int) -> tuple[int, int]:
    """Size of a group and how many a row of `inputs` weights has; a short row is one group of even size."""
    size = min(group, inputs + inputs % 2)
    return size, -(-inputs // size)


def power_of_two(size: int) -> int:
    """The largest power of two that is not above `size`."""
    return 1 << (size.bit_length() - 1)


def in_groups(weight: Tensor, group: int) -> Tensor:
    """[n, k] as [n, groups, group], filled up with zeros."""
    size, count = group_of(weight.shape[1], group)
    return torch.nn.functional.pad(weight, (0, size * count - weight.shape[1])).unflatten(-1, (count, size))


def nibbles(numbers: Tensor) -> Tensor:
    """Integers 0 .. 15 [n, k], k even, as uint8 [n, k / 2]."""
    numbers = numbers.to(torch.uint8)
    return numbers[:, ::2] | (numbers[:, 1::2] << 4)


def from_nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, k / 2] as uint8 [n, k] of 0 .. 15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def to_integers(weight: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """round(weight / scale) within low .. high; 0 where the scale is 0."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / safe).round().clamp_min(low).clamp_max(high)  # numbers stay numbers: a GPU refuses a CPU tensor


def best_scale(weight: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor, rounding: Rounding) -> Tensor:
    """The scale as it is ("nearest"), or for each row the shrunk one of the smallest error ("mse").

    "flexround" starts from the scale of "mse".
    """
    if rounding == "nearest":
        return scale
    best, least = scale, torch.full_like(scale, torch.inf)
    for factor in _SHRINK.tolist():
        tried = scale * factor
        error = (to_integers(weight, tried, low, high) * tried - weight).abs().pow(2.4).sum(-1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, a power of two; its own inverse."""
    size, width = x.shape[-1], 1
    while width < size:
        pairs = x.unflatten(-1, (-1, 2, width))
        first, second = pairs.unbind(-2)
        x = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return x * size**-0.5
