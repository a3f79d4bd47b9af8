"""How a skipped value is made: fixed weights over the values computed before, on the true grid of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from .combining import combine as combine
from .damped import damped, halfway
from .polynomial import adams_bashforth, reuse
from .spectrum import spectrum

Axis: TypeAlias = Literal["step", "timestep", "sigma", "logsnr"]

PREDICTORS: dict[str, Callable[[float, Sequence[float]], list[float]]] = {
    "reuse": reuse,
    "adams_bashforth": adams_bashforth,
    # a Taylor forecast whose derivatives are true divided differences is that very polynomial (Newton's form)
    "taylor": adams_bashforth,
    "halfway": halfway,
    "spectrum": spectrum,
}
FEWEST = {"spectrum": 3}  # values without which a predictor would be another one


def weights(
    name: str, order: int, lebesgue_max: float, at: float, anchors: Sequence[float], damping: float = 1.0
) -> list[float]:
    """Weights of the newest `order` anchors, as few as keep sum |w| (the Lebesgue constant) within bounds.

    damping: share of the forecast change that is taken.
    """
    known = anchors[-order:]
    found = damped(PREDICTORS[name](at, known), damping)
    while len(known) > 1 and sum(map(abs, found)) > lebesgue_max:
        known = known[1:]
        found = damped(PREDICTORS[name](at, known), damping)
    return found
