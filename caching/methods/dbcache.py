"""DBCache: the first blocks probe, the last ones correct, what lies between is cached. Source: https://github.com/vipshop/cache-dit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.region import Region
from fastdiff.caching.sites import block_stack, stack_blocks

from .first_block import FirstBlock


class DBCache(FirstBlock):
    """First Block Cache with `live_blocks` at the front and `tail_blocks` at the end that always run.

    Formula: as first_block: h_i = tail(live(x_i) + R_j), where R_j is what the blocks between added at the last
    computed step j.
    """

    method: Literal["dbcache"] = "dbcache"  # type: ignore[assignment]
    threshold: float = Field(0.08, ge=0, description="relative change from which on a step is computed")
    live_blocks: int | None = Field(None, ge=1, description="blocks at the front; None: 8, or a quarter of them")  # type: ignore[assignment]
    tail_blocks: int = Field(0, ge=0, description="blocks at the end that run on the cached streams")
    warmup_steps: int = Field(8, ge=0, description="computed steps at the start")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        live = self.live_blocks or max(1, min(8, len(stack_blocks(anatomy)) // 4))
        return [block_stack(anatomy, live, self.tail_blocks)]
