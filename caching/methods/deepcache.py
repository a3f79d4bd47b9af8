"""DeepCache: Accelerating Diffusion Models for Free. Paper: https://arxiv.org/abs/2312.00858 (CVPR 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, every
from fastdiff.caching.region import Region
from fastdiff.caching.unet import unet_inner
from fastdiff.clock import Run


class DeepCache(CacheMethod):
    """Reuse a UNet's deep features every `interval` steps; only the layers outside skip `branch` run in between.

    Formula: up(skip_b(x_i), D_j): the up layers outside skip b = `branch` run on this step's skip and on the deep
    features D of the last computed step j.
    """

    method: Literal["deepcache"] = "deepcache"
    interval: int = Field(3, ge=1, description="compute in full every so many steps")
    branch: int = Field(0, ge=0, description="skip connection to split at, 0 is the outermost")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [unet_inner(anatomy, self.branch)]

    def mask(self, run: Run, region: Region) -> list[bool]:
        return every(self.interval, run, self.warmup_steps)
