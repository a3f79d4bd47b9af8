"""Part of a forecast change: between the last value and what a predictor makes of the history.

HiCache (arXiv 2508.16984) damps each order with one number for a run, MeanCache (arXiv 2601.19961) has one for each
step, 1/4 to 2/5 of a line. Which one is best for a step follows from the Gram matrix of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .polynomial import adams_bashforth


def damped(factors: Sequence[float], share: float) -> list[float]:
    """(1 - g) reuse + g predictor, g the share: 0 is the last value, 1 the predictor to the bit."""
    return [share * factor for factor in factors[:-1]] + [share * factors[-1] + (1 - share)]


def halfway(at: float, anchors: Sequence[float]) -> list[float]:
    """Between reuse and the polynomial: half of the forecast change, for features that turn; exact for constants."""
    return damped(adams_bashforth(at, anchors), 0.5)


def best_share(block: NDArray[np.float64], wanted: NDArray[np.float64], factors: Sequence[float]) -> float:
    """g* = <e, p> / |p|^2 within 0 to 1: of all damped forecasts the one nearest to the truth in the mean of a trace.

    p = sum_j w_j f_j - f_a is the change that the factors w forecast, e = f - f_a the true one, f_a the newest value.
    block: inner products of the values f_j with each other, wanted: of each with the truth f. 0 where the factors
    forecast no change that could be told from rounding.
    """
    change = np.asarray(factors, dtype=np.float64) - np.eye(len(factors))[-1]
    length = float(change @ block @ change)
    if length <= 1e-12 * float(np.trace(block)):
        return 0.0
    return float(np.clip(change @ (wanted - block[:, -1]) / length, 0.0, 1.0))
