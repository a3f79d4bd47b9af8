"""TaylorSeer: from reusing to forecasting. Paper: https://arxiv.org/abs/2503.06923 (ICCV 2025)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, every
from fastdiff.caching.predictors import Axis
from fastdiff.caching.region import Region
from fastdiff.caching.sites import model_output, sublayers
from fastdiff.clock import Run


class TaylorSeer(CacheMethod):
    """Forecast each attention and feed-forward layer's output by a Taylor series over the computed steps.

    `order` counts the computed values: 3 is the paper's second order. Derivatives are divided differences, so that a
    quadratic feature is forecast exactly, which plain differences do not do. `lite` forecasts the model's output only.

    Formula: f(s) = sum_(k < order) f[s_0, ..., s_k] prod_(m < k) (s - s_m), with the divided differences f[...]
    over the newest computed steps s_0, s_1, ...
    """

    method: Literal["taylorseer"] = "taylorseer"
    interval: int = Field(4, ge=1, description="compute every so many steps")
    predictor: str = Field("taylor", description="how a skipped value is made")
    order: int = Field(3, ge=1, le=6, description="computed values a prediction may use")
    coordinate: Axis = Field("step", description="axis on which predictions extrapolate")
    warmup_steps: int = Field(3, ge=0, description="computed steps at the start")
    lite: bool = Field(False, description="forecast the model's output instead of every layer's: far less memory")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [model_output(anatomy)] if self.lite else sublayers(anatomy)

    def mask(self, run: Run, region: Region) -> list[bool]:
        return every(self.interval, run, self.warmup_steps)
