"""First Block Cache: one block tells whether the rest may be skipped. Source: https://github.com/chengzeyi/ParaAttention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Gated, relative_change
from fastdiff.caching.region import Memory, Region
from fastdiff.caching.sites import block_stack
from fastdiff.clock import Step


class FirstBlock(Gated):
    """Skip all but the first blocks while their residual stays near that of the last computed step.

    Formula: computed where mean |r_i - r_j| / mean |r_j| reaches `threshold`, r the residual of the live blocks, j
    the last computed step; else h_i = live(x_i) + R_j, with R_j what the other blocks added at j.
    """

    method: Literal["first_block"] = "first_block"
    live_blocks: int = Field(1, ge=1, description="blocks that always run and are compared")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [block_stack(anatomy, self.live_blocks)]

    def change(self, step: Step, memory: Memory) -> Tensor:
        assert memory.probe is not None
        return relative_change(memory.probe, memory.probes[-1])
