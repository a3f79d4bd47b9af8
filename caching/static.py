"""Compute exactly the listed steps (the baseline every paper needs; SCM in cache-dit, https://github.com/vipshop/cache-dit)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run
from fastdiff.errors import BadConfig

from .base import CacheMethod
from .region import Region
from .sites import block_stack, model_output, unet_inner


class Static(CacheMethod):
    """An explicit list of steps to compute; the rest is predicted at the chosen site."""

    method: Literal["static"] = "static"
    compute_steps: tuple[int, ...] = Field(
        min_length=1, description="steps to compute, counted from 0; step 0 always is"
    )
    of_steps: int | None = Field(
        None, ge=1, description="run length the list was made for; other lengths use the same fractions of the run"
    )
    site: Literal["output", "inner", "stack"] = Field("output", description="what the other steps leave out")
    branch: int = Field(0, ge=0, description="skip connection to split at (site inner)")
    live_blocks: int = Field(1, ge=1, description="blocks that always run (site stack)")

    @field_validator("compute_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(s < 0 for s in steps):
            raise ValueError(f"compute_steps holds {min(steps)}; steps count from 0")
        return tuple(sorted(set(steps)))

    def regions(self, anatomy: Anatomy) -> list[Region]:
        if self.site == "inner":
            return [unet_inner(anatomy, self.branch)]
        if self.site == "stack":
            return [block_stack(anatomy, self.live_blocks)]
        return [model_output(anatomy)]

    def mask(self, run: Run) -> list[bool]:
        length = self.of_steps or run.total
        if self.compute_steps and self.compute_steps[-1] >= length:
            raise BadConfig(f"compute_steps holds {self.compute_steps[-1]}, but the run has steps 0 to {length - 1}")
        chosen = {round(step * (run.total - 1) / max(1, length - 1)) for step in self.compute_steps}
        return [i in chosen for i in range(run.total)]
