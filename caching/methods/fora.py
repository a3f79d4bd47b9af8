"""FORA: Fast-Forward Caching in Diffusion Transformer Acceleration. Paper: https://arxiv.org/abs/2407.01425."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, every
from fastdiff.caching.region import Region
from fastdiff.caching.sites import sublayers
from fastdiff.clock import Run


class FORA(CacheMethod):
    """Reuse the output of every attention and feed-forward layer for `interval` steps.

    Formula: f_i = f_j for the output f of each layer, j the last computed step.
    """

    method: Literal["fora"] = "fora"
    interval: int = Field(2, ge=1, description="compute every so many steps")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return sublayers(anatomy)

    def mask(self, run: Run, region: Region) -> list[bool]:
        return every(self.interval, run, self.warmup_steps)
