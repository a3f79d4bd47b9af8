"""How often values of which size were seen: percentiles of all of them, of which none is kept."""

from __future__ import annotations

import torch
from torch import Tensor

_PARTS = 5  # bits of the mantissa that tell a bin: 32 bins to an octave, so that an edge is within 1/32 of the value
_LEAST, _OCTAVES = -20, 32  # exponent of the smallest bin, and how many follow; what lies outside is in the last ones
_BINS = _OCTAVES << _PARTS


class Histogram:
    """Exact counts of values in bins that are the same for all: none moves, so the order of values is of no account.

    A bin is what shares a sign, an exponent and 5 bits of the mantissa in float32: 16 kB for all bins.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * _BINS, dtype=torch.int64)  # of positive values, then of negative ones

    def add(self, values: Tensor) -> None:
        """values: finite float32 of any shape, on the CPU."""
        flat = values.flatten()
        bins = ((flat.abs().view(torch.int32) >> (23 - _PARTS)) - ((127 + _LEAST) << _PARTS)).clamp_(0, _BINS - 1)
        self.counts += torch.bincount(bins + _BINS * (flat < 0), minlength=2 * _BINS)

    def edges(self, percentile: float) -> tuple[float, float]:
        """The range that holds 0 and so many percent of the values, with half of the others below and above it.

        Each edge is the outer one of its bin: never less than was asked is held. Infinity stands for values beyond the
        last bin; 100 gives a range of all values.
        """
        positive, negative = self.counts.view(2, _BINS)
        beyond = int(int(self.counts.sum()) * (100 - percentile) / 200)
        return -_outer(negative, beyond), _outer(positive, beyond)


def _outer(counts: Tensor, beyond: int) -> float:
    """The outer edge of the outermost bin that may not be left out, if so many values may; 0 if all may."""
    held = torch.nonzero(counts.flip(0).cumsum(0) > beyond)
    if not len(held):
        return 0.0
    number = _BINS - int(held[0])  # of the next bin outwards, whose lower edge it is
    if number == _BINS:
        return float("inf")
    octave, part = divmod(number, 1 << _PARTS)
    return float(2.0 ** (_LEAST + octave) * (1 + part / (1 << _PARTS)))
