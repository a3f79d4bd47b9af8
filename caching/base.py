"""What every cache method shares: its common settings, and the guards around its decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run
from fastdiff.errors import UnknownName
from fastdiff.method import Method

from .predictors import PREDICTORS, weights
from .region import Region


class CacheMethod(Method):
    """A point in the grid of site (`regions`), policy (`mask` or `should_compute`) and predictor.

    A method with a `mask` is static: what is computed is known before the run, the same on all ranks. A dynamic one
    is asked at each step, with its probe now and at the last computed step.
    """

    predictor: str = Field("reuse", description="how a skipped value is made: " + " or ".join(PREDICTORS))
    order: int = Field(2, ge=1, le=6, description="computed values a prediction may use")
    coordinate: Literal["step", "timestep", "sigma", "logsnr"] = Field(
        "timestep", description="axis on which predictions extrapolate"
    )
    lebesgue_max: float = Field(6.0, ge=1, description="drop the order while the weights amplify errors more than this")
    warmup_steps: int = Field(0, ge=0, description="computed steps at the start")
    cooldown_steps: int = Field(0, ge=0, description="computed steps at the end")
    max_consecutive_cached: int | None = Field(
        None, ge=1, description="compute at the latest after so many cached steps"
    )

    @field_validator("predictor")
    @classmethod
    def _known_predictor(cls, name: str) -> str:
        if name not in PREDICTORS:
            raise ValueError(str(UnknownName("predictor", name, PREDICTORS)))
        return name

    def regions(self, anatomy: Anatomy) -> list[Region]:
        """What a cached step leaves out. Raises UnsupportedModel, with the reason, where that is nothing."""
        raise NotImplementedError

    def mask(self, run: Run) -> list[bool] | None:
        """True for each step to compute; None if `should_compute` decides."""
        return None

    def should_compute(self, probe: Tensor, last: Tensor) -> bool:
        """Dynamic methods: is this step too different from the last computed one?"""
        raise NotImplementedError

    def weights(self, run: Run, index: int, anchors: Sequence[int]) -> list[float]:
        """Factors of the newest values, computed at the steps `anchors`, that make the value of step `index`."""
        axis = run.coordinates(self.coordinate)
        return weights(self.predictor, self.order, self.lebesgue_max, axis[index], [axis[a] for a in anchors])

    def notes(self, run: Run) -> list[str]:
        """What the report should say of a run that begins."""
        return []

    def guarded(self, wanted: bool, index: int, total: int, cached_in_row: int) -> bool:
        """The method's wish, overruled by warm-up, cool-down and the longest run of cached steps."""
        if index < max(1, self.warmup_steps) or index >= total - self.cooldown_steps:
            return True
        return wanted or (self.max_consecutive_cached is not None and cached_in_row >= self.max_consecutive_cached)

    def guarded_mask(self, run: Run) -> list[bool] | None:
        wished = self.mask(run)
        if wished is None:
            return None
        out: list[bool] = []
        for index, wanted in enumerate(wished):
            in_row = next((k for k, done in enumerate(reversed(out)) if done), len(out))
            out.append(self.guarded(wanted, index, run.total, in_row))
        return out


def every(interval: int, run: Run, warmup_steps: int) -> list[bool]:
    """Compute the warm-up steps, and each `interval`-th step counted from the last of them."""
    start = max(0, warmup_steps - 1)
    return [i < start or (i - start) % interval == 0 for i in range(run.total)]


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute change relative to the mean magnitude before; infinite where that is zero."""
    return float((now - before).abs().mean() / before.abs().mean().clamp_min(torch.finfo(torch.float32).tiny))
