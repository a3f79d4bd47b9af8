"""MagCache: magnitude-aware caching for video. Paper: https://arxiv.org/abs/2506.09045 (NeurIPS 2025)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.caching.plan import PLAN, Plan, from_file
from fastdiff.caching.planned import Planned
from fastdiff.caching.protocols import Calibrator, Passes, Sample
from fastdiff.caching.region import Region, tensors
from fastdiff.caching.sites import at
from fastdiff.clock import Run
from fastdiff.plans import Each


class Ratios(Plan):
    """How much each step's residual is larger than the one before, from an uncached run; the first is 1."""

    ratios: tuple[NonNegativeFloat, ...] = Field(min_length=1, max_length=10_000)

    def summary(self) -> str:
        return f"magnitude ratios from {min(self.ratios):.3f} to {max(self.ratios):.3f} over {len(self.ratios)} steps"


class MagCache(Planned):
    """Skip while the product of the residual's magnitude ratios, known from a calibration, stays near 1.

    Formula: skipped while E = sum |1 - prod g_m| stays within `threshold`: the sum over the steps since the last
    computed one j, the product over m from j + 1 to the step, g_m = |r_m| / |r_(m-1)| from the calibration.
    """

    method: Literal["magcache"] = "magcache"
    threshold: float = Field(0.06, ge=0, description="sum of magnitude errors from which on a step is computed")
    retention: float = Field(0.2, ge=0, le=1, description="share of the run that is computed at its start")
    max_consecutive_cached: int | None = Field(3, ge=1, description="compute at the latest after so many cached steps")
    plan: Annotated[Ratios | Each[Ratios] | None, from_file(Ratios)] = Field(None, description=PLAN)

    def regions(self, anatomy: Anatomy) -> list[Region]:
        self.found.check_model(anatomy)
        return [self._region(anatomy)]

    def _region(self, anatomy: Anatomy) -> Region:
        return at("stack" if anatomy.blocks else "output", anatomy, live=0)

    def mask(self, run: Run, region: Region) -> list[bool]:
        plan = self.found
        logs = np.cumsum(np.log(np.maximum(plan.ratios, 1e-6)))  # so that the product between any two is known
        known = np.interp(plan.places(run), np.arange(len(logs)), logs)
        out: list[bool] = []
        error, last, in_row, calls = 0.0, 0, 0, plan.calls(run)
        for index in range(run.total):
            error += abs(1.0 - float(np.exp(known[index] - known[last])))
            skip = index >= max(1, round(self.retention * run.total)) and error <= self.threshold
            skip = skip and calls[index] and calls[index - 1]  # the first call of a denoiser has nothing to go by
            skip = skip and self.threshold > 0 and in_row < (self.max_consecutive_cached or run.total)
            if not skip:
                error, last = 0.0, index
            in_row = in_row + 1 if skip else 0
            out.append(not skip)
        return out

    def calibrated(self, calibrator: Calibrator) -> Passes:
        sums: dict[int, list[float]] = {}
        before: dict[int, tuple[int, int, Tensor]] = {}  # by branch: number of the run, step, sizes

        def seen(sample: Sample) -> None:
            step, sizes = sample.step, _sizes(sample.value)
            number, index, known = before.get(step.branch, (0, 0, sizes))
            if (number, index + 1) == (step.run.number, step.index):
                sums.setdefault(step.index, []).append(float((sizes / known.clamp_min(1e-12)).mean()))
            before[step.branch] = step.run.number, step.index, sizes

        run = yield from calibrator.observe(self, seen, regions=[self._region(calibrator.anatomy)])
        ratios = [1.0, *(float(np.mean(sums.get(index, [1.0]))) for index in range(1, run.total))]
        return self.with_plan(Ratios(**calibrator.origin(run), ratios=tuple(ratios)))


def _sizes(value: list) -> Tensor:
    """The magnitude of a residual, by place of the first stream."""
    first = tensors(value)[0].detach()
    return torch.linalg.vector_norm(first.float(), dim=1 if first.ndim > 3 else -1)
