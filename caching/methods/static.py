"""Compute exactly the listed steps (the baseline every paper needs; SCM in cache-dit, https://github.com/vipshop/cache-dit)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Steps, spread
from fastdiff.caching.region import Region
from fastdiff.caching.sites import Site, at
from fastdiff.clock import Run


class Static(CacheMethod):
    """An explicit list of steps to compute; the rest is predicted at the chosen site.

    Formula: v_i from the computed steps before i, by the predictor; with `reuse` v_i = v_j, j the last of them.
    """

    method: Literal["static"] = "static"
    compute_steps: Steps = Field(min_length=1, description="steps to compute, counted from 0; step 0 always is")
    of_steps: int | None = Field(
        None, ge=1, description="run length the list was made for; other lengths use the same fractions of the run"
    )
    site: Site = Field("output", description="what the other steps leave out")
    branch: int = Field(0, ge=0, description="skip connection to split at (site inner)")
    live_blocks: int = Field(1, ge=0, description="blocks that always run (site stack)")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [at(self.site, anatomy, live=self.live_blocks, branch=self.branch)]

    def mask(self, run: Run, region: Region) -> list[bool]:
        return spread(self.compute_steps, self.of_steps or run.total, run, "compute_steps")
