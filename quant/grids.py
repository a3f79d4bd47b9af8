"""Levels that are best for a normal distribution, and numbers of 2 and 3 bits in bytes.

Source of the levels: HIGGS, https://arxiv.org/abs/2411.17525; they are Lloyd's and Max's of N(0, 1), one at a time.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .rounding import from_nibbles, nibbles

_POSITIVE = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
}  # by bits, the half that is not mirrored


@cache
def normal_levels(bits: int, device: torch.device) -> Tensor:
    """All 2 ^ bits levels, rising; brought to a device once, not at each call of a layer."""
    positive = torch.tensor(_POSITIVE[bits])
    return torch.cat([-positive.flip(0), positive]).to(device)


def in_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Integers 0 .. 2 ^ bits - 1 [n, k] as uint8: of 4 bits two to a byte, k being even; of 2 and 3 bits eight to
    `bits` bytes, the first in the lowest bits, a row filled up with zeros to a multiple of eight."""
    if bits == 4:
        return nibbles(numbers)
    eights = torch.nn.functional.pad(numbers.int(), (0, -numbers.shape[1] % 8)).unflatten(-1, (-1, 8))
    word = (eights << _places(8, bits, numbers.device)).sum(-1, keepdim=True, dtype=torch.int32)
    return (word >> _places(bits, 8, numbers.device)).bitwise_and(255).to(torch.uint8).flatten(1)


def from_bytes(held: Tensor, bits: int, count: int) -> Tensor:
    """uint8 as the integers [n, count] that `in_bytes` was given, int32, or uint8 of 4 bits."""
    if bits == 4:
        return from_nibbles(held)
    word = held.int().unflatten(-1, (-1, bits)) << _places(bits, 8, held.device)
    eights = word.sum(-1, keepdim=True, dtype=torch.int32) >> _places(8, bits, held.device)
    return eights.bitwise_and((1 << bits) - 1).flatten(1)[:, :count]


def _places(count: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * width, width, dtype=torch.int32, device=device)
