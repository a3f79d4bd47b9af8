"""The guard `verify`: what a plan's forecasts are worth, seen at the steps that are computed anyway.

Related: SpeCa, https://arxiv.org/abs/2509.11628, which runs the last block of a skipped step; here nothing more is run.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .reading import Reading
from .region import Memory

FIRST = 0.1  # of speca, at the first step: its authors' floor for FLUX, where forecasts are of one block
USUAL = 0.5  # relative error of a forecast that has failed, where nothing was calibrated
MARGIN = 1.5  # times the largest error that calibration saw at a step
LEAST = 0.01  # relative error that rounding may make of a forecast which is exact
LATE = 2  # steps from a check to the first decision on it


class Verify:
    """The checks of one run: at a computed step, the forecast that a skipped one would have had beside what came out.

    After a check that failed, steps that the plan skips are computed until one holds. A check at step i decides from
    step i + 2 on: by then a step's work has been launched behind it, so that a host which waits for the number leaves
    the device with work to do; the decision does not depend on when it arrives, and is the same on all ranks.
    """

    def __init__(
        self, bounds: Sequence[float], forecast: Callable[[int, Memory, int], list[Any]],
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """bounds: by step, the relative error at which a forecast has failed. forecast: the leaves that region `number`
        would give at a step by its memory. agree: makes a number the same on all ranks."""
        self.bounds, self._forecast, self._agree = bounds, forecast, agree
        self._worst: dict[int, Tensor] = {}  # by step, over its calls and regions
        self._read: dict[int, Reading] = {}
        self._failed: dict[int, bool] = {}
        self._computed: set[int] = set()

    def check(self, index: int, memories: Sequence[Memory]) -> None:
        """A call is over: what it computed has been taken, and is in no history yet."""
        errors = [
            apart(self._forecast(number, memory, index), memory.taken)
            for number, first in enumerate(memories)
            for memory in (first, *first.again)
            if memory.values and memory.taken is not None and not memory.torn
        ]
        if errors:
            self.saw(index, errors)

    def saw(self, index: int, errors: Sequence[Tensor]) -> None:
        """Relative errors of forecasts of a step, scalars; its worst counts."""
        worst = torch.stack([error.to(errors[0].device) for error in errors]).amax()
        worst = worst if self._agree is None else self._agree(worst)
        before = self._worst.get(index, worst)
        self._worst[index] = torch.maximum(before, worst.to(before.device))
        self._read[index] = Reading(self._worst[index])

    def fails(self, index: int) -> bool:
        """Whether a step is computed whatever the plan says; asked of steps that it skips."""
        known = [step for step in self._read if step <= index - LATE]
        failing = self._fails(max(known)) if known else self.bounds[index] <= 0
        if failing:
            self._computed.add(index)
        return failing

    def _fails(self, step: int) -> bool:
        if step not in self._failed:  # also where it is not a number
            self._failed[step] = not float(self._read[step]) < self.bounds[step]
        return self._failed[step]

    def tell(self, report: MutableMapping[str, int]) -> None:
        """Adds what was found to a report; the run is over, and the device has been waited for."""
        failed = sum(self._fails(step) for step in self._read)
        for what, count in {"checked": len(self._read), "failed": failed, "computed": len(self._computed)}.items():
            report[what] = report.get(what, 0) + count


def apart(forecast: Sequence[Any], truth: Sequence[Any]) -> Tensor:
    """|forecast - truth| / |truth| over all numbers of some leaves, a scalar on their device; huge where that is 0."""
    pairs = [(p, t) for p, t in zip(forecast, truth, strict=True) if isinstance(t, Tensor) and t.is_floating_point()]
    wide = [torch.promote_types(t.dtype, torch.float32) for _, t in pairs]
    norms = [
        torch.stack([torch.linalg.vector_norm(p.to(d) - t.to(d)), torch.linalg.vector_norm(t.to(d))])
        for (p, t), d in zip(pairs, wide, strict=True)
    ]
    error, whole = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return (error / whole.clamp_min(torch.finfo(torch.float32).tiny)).float()


def forecast_errors(
    grams: NDArray[np.float64], predict: Callable[[int, Sequence[int]], Sequence[float]], computed: Sequence[int]
) -> dict[int, float]:
    """By computed step after the first, the largest relative error over traced runs of the forecast it would have had.

    grams: (runs, steps, steps) inner products of what was traced. predict: factors of the newest of given steps.
    """
    found = {}
    for place, at in enumerate(computed[1:], 1):
        factors = np.asarray(predict(at, computed[:place]), dtype=np.float64)
        mixed = [*computed[place - len(factors) : place], at]
        signs = np.append(factors, -1.0)
        errors = np.einsum("i,rij,j->r", signs, grams[:, mixed][:, :, mixed], signs)
        whole = np.maximum(grams[:, at, at], np.finfo(np.float64).tiny)
        found[at] = float(np.sqrt(np.maximum(errors, 0) / whole).max())
    return found


def bounds_of(seen: dict[int, float], total: int) -> list[float]:
    """By step, what calibration saw at the next step that the plan computes, with a margin."""
    last = max(seen)
    return [max(LEAST, MARGIN * seen[next((s for s in sorted(seen) if s >= i), last)]) for i in range(total)]
