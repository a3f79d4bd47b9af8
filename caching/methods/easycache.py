"""EasyCache: runtime-adaptive caching for video diffusion. Paper: https://arxiv.org/abs/2507.02860."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Gated
from fastdiff.caching.region import Memory, Region, tensors
from fastdiff.caching.sites import latent_probe, model_output
from fastdiff.clock import Step


class EasyCache(Gated):
    """Skip the model while its output, at its last rate of change over its input, should have moved little.

    Formula: skipped while the sum over skipped steps of k |x_i - x_(i-1)| / |y| stays below `threshold`, with k =
    |y_1 - y_0| / |x_1 - x_0| of the two newest computed steps, x the input, y the output.
    """

    method: Literal["easycache"] = "easycache"
    threshold: float = Field(0.05, ge=0, description="sum of expected changes from which on a step is computed")
    warmup_steps: int = Field(5, ge=0, description="computed steps at the start")
    cooldown_steps: int = Field(1, ge=0, description="computed steps at the end")

    @property
    def history(self) -> int:
        """The rate of change is that between the two newest computed steps."""
        return max(2, super().history)

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [model_output(anatomy, latent_probe(anatomy))]

    def change(self, step: Step, memory: Memory) -> Tensor:
        """Sum of k |x_t - x_t-1| / |y|, with k = |y_1 - y_0| / |x_1 - x_0| of the two newest computed steps."""
        assert memory.probe is not None and memory.previous is not None
        output = tensors(memory.values[-1])[0]
        moved = _size(memory.probe - memory.previous)
        if len(memory.probes) < 2:
            return memory.drift + moved / _size(memory.previous)
        rate = _size(output - tensors(memory.values[-2])[0]) / _size(memory.probes[-1] - memory.probes[-2])
        return memory.drift + rate * moved / _size(output)


def _size(difference: Tensor) -> Tensor:
    return difference.abs().mean().float()
