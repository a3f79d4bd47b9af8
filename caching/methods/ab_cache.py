"""AB-Cache: Training-Free Acceleration via Adams-Bashforth Inspired Feature Reuse. Paper: https://arxiv.org/abs/2504.10540."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, every
from fastdiff.caching.region import Region
from fastdiff.caching.sites import at, each_block
from fastdiff.clock import Run


class ABCache(CacheMethod):
    """Compute every `interval` steps, extrapolate the model's output in between on the run's own time grid.

    Formula: steps below w and then every k-th are computed (w = `warmup_steps`, k = `interval`). In between v_i =
    sum_j c_j v_j over the newest `order` computed steps j, with c_j = prod_(m != j) (s_i - s_m) / (s_j - s_m), s
    the `coordinate` of a step.
    """

    method: Literal["ab_cache"] = "ab_cache"
    interval: int = Field(2, ge=1, description="compute every so many steps")
    predictor: str = Field("adams_bashforth", description="how a skipped value is made")
    warmup_steps: int = Field(3, ge=0, description="computed steps at the start")
    site: Literal["output", "stack", "blocks"] = Field("output", description="what is predicted")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return each_block(anatomy) if self.site == "blocks" else [at(self.site, anatomy, live=0)]

    def mask(self, run: Run, region: Region) -> list[bool]:
        return every(self.interval, run, self.warmup_steps)
