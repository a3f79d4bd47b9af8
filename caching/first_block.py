"""First Block Cache: one block tells whether the rest may be skipped. Source: https://github.com/chengzeyi/ParaAttention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy

from .base import CacheMethod, relative_change
from .region import Region
from .sites import block_stack


class FirstBlock(CacheMethod):
    """Skip all but the first blocks while their residual stays near that of the last computed step."""

    method: Literal["first_block"] = "first_block"
    threshold: float = Field(0.1, ge=0, description="relative change of the residual above which a step is computed")
    live_blocks: int = Field(1, ge=1, description="blocks that always run and are compared")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [block_stack(anatomy, self.live_blocks)]

    def should_compute(self, probe: Tensor, last: Tensor) -> bool:
        return not relative_change(probe, last) < self.threshold  # also where it is not a number
