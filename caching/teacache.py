"""TeaCache: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model. Paper: https://arxiv.org/abs/2411.19108."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Step

from .base import Gated, relative_change
from .region import Memory, Region
from .sites import attention_input, block_stack


class TeaCache(Gated):
    """Skip until the changes of the modulated input of the first attention layer add up to the threshold."""

    method: Literal["teacache"] = "teacache"
    threshold: float = Field(0.15, ge=0, description="sum of rescaled changes from which on a step is computed")
    coefficients: tuple[float, ...] = Field(
        (1.0, 0.0), min_length=1, max_length=8,
        description="polynomial from input change to output change, highest power first; calibrate fits it",
    )  # fmt: skip
    cooldown_steps: int = Field(1, ge=0, description="computed steps at the end")

    accumulates: ClassVar[bool] = True

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [block_stack(anatomy, 1, probe=attention_input(anatomy))]

    def change(self, step: Step, memory: Memory) -> Tensor:
        assert memory.probe is not None and memory.previous is not None
        moved = relative_change(memory.probe, memory.previous)
        rescaled = moved * 0
        for coefficient in self.coefficients:
            rescaled = rescaled * moved + coefficient
        return memory.drift + rescaled.abs()
