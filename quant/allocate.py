"""Which layer gets how many bits: an exact knapsack by dynamic programming.

The error model is linear, as in HIGGS (https://arxiv.org/abs/2411.17525): what quantizing a layer adds to the error of
the denoiser's output does not depend on the other layers, so that the errors of a choice sum up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd, inf

import numpy as np

from fastdiff.errors import BadConfig

Choice = int | str  # bits, or the name of a format
Table = Mapping[str, Mapping[Choice, float]]
Sizes = Mapping[str, Mapping[Choice, int]]
_WIDEST = 1 << 17  # columns of the table; a model of more bytes is counted in coarser units, rounded up


@dataclass(frozen=True)
class Allocation:
    """Bits by layer, the bytes they take and the error that the linear model predicts."""

    bits: dict[str, Choice]
    bytes: int
    error: float


def allocate(
    errors: Table, sizes: Sizes, *, budget: int | None = None, target: float | None = None, fixed: int = 0
) -> Allocation:  # fmt: skip
    """The least summed error within `budget` bytes, or the fewest bytes within a summed error of `target`.

    errors, sizes: by layer and bits; the same choices in both. fixed: bytes of what has no choice, which the budget
    must hold too. Of equal errors the fewest bytes win. The optimum is
    exact where the bytes above the smallest choice, in units of their greatest common divisor, are at most 131072; in
    larger models a layer's bytes are rounded up to a unit of 1/131072 of them, and the budget still holds.

    Raises BadConfig for a budget below the smallest, or a target below the least error that is reachable; it says it.
    """
    least = {name: min(choices.values()) for name, choices in sizes.items()}
    base, unit = sum(least.values()), _unit(sizes, least)
    if budget is not None and budget < base + fixed:
        raise BadConfig(
            f"a budget of {_mb(budget)} is below what these choices of bits reach; the smallest is {_mb(base + fixed)}"
        )
    width = sum(max(_columns(choices, least[name], unit).values()) for name, choices in sizes.items())
    if budget is not None:
        width = min(width, (budget - base - fixed) // unit)
    best, taken = _table(errors, sizes, least, unit, width)
    column = width
    if target is not None:
        within = np.flatnonzero(best <= target * (1 + 1e-12))
        if not len(within):
            lowest = float(best.min())
            raise BadConfig(
                f"an error of {target:g} is below what these choices of bits reach; the least is {lowest:g}"
            )
        column = int(within[0])
    column = int(np.flatnonzero(best[: column + 1] == best[column])[0])
    return _read_off(errors, sizes, least, unit, taken, column)


def _table(errors: Table, sizes: Sizes, least: Mapping[str, int], unit: int, width: int) -> tuple[np.ndarray, list]:
    """best[c] is the least error with at most c units above the smallest choices; which choice made it, by layer."""
    best, taken = np.zeros(width + 1), []
    for name, choices in errors.items():
        columns = _columns(sizes[name], least[name], unit)
        made, chosen = np.full(width + 1, inf), np.zeros(width + 1, dtype=np.uint8)
        for number, (bits, error) in enumerate(choices.items()):
            cost = columns[bits]
            if cost > width:
                continue
            reached = best[: width + 1 - cost] + error
            better = reached < made[cost:]
            made[cost:][better] = reached[better]
            chosen[cost:][better] = number
        best = made
        taken.append(chosen)
    return best, taken


def _read_off(
    errors: Table, sizes: Sizes, least: Mapping[str, int], unit: int, taken: list, column: int
) -> Allocation:  # fmt: skip
    bits: dict[str, Choice] = {}
    for name, chosen in zip(reversed(list(errors)), reversed(taken), strict=True):
        bits[name] = list(errors[name])[chosen[column]]
        column -= _columns(sizes[name], least[name], unit)[bits[name]]
    bits = {name: bits[name] for name in errors}
    return Allocation(
        bits, sum(sizes[n][b] for n, b in bits.items()), float(sum(errors[n][b] for n, b in bits.items()))
    )


def _unit(sizes: Sizes, least: Mapping[str, int]) -> int:
    extra = [size - least[name] for name, choices in sizes.items() for size in choices.values()]
    exact = max(1, reduce(gcd, extra, 0))
    most = sum(max(choices.values()) - least[name] for name, choices in sizes.items())
    return exact if most // exact < _WIDEST else -(-most // _WIDEST)


def _columns(choices: Mapping[Choice, int], least: int, unit: int) -> dict[Choice, int]:
    return {bits: -(-(size - least) // unit) for bits, size in choices.items()}


def _mb(count: int) -> str:
    return f"{count / 1e6:.4g} MB"
