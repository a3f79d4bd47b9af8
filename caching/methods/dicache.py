"""DiCache: Let Diffusion Model Determine Its Own Cache. Paper: https://arxiv.org/abs/2508.17356."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastdiff.caching.base import Agree, Weigh, relative_change
from fastdiff.caching.region import Memory
from fastdiff.clock import Run, Step

from .first_block import FirstBlock


class DiCache(FirstBlock):
    """Skip while the changes of the first blocks' residual add up to little; they say how far the others moved, too.

    Formula: skipped while the sum over skipped steps of mean |q_i - q_(i-1)| / mean |q_(i-1)| stays below `threshold`,
    q the residual of the live blocks. Then R_i = R_b + g (R_a - R_b), R what the other blocks added at the last
    computed steps b < a, g = mean |q_i - q_b| / mean |q_a - q_b|, at least 1 (reuse), at most `slope_max`.
    """

    method: Literal["dicache"] = "dicache"  # type: ignore[assignment]
    threshold: float = Field(0.2, ge=0, description="sum of relative changes from which on a step is computed")
    predictor: str = Field("adams_bashforth", description="how a skipped value is made without slope")
    slope: bool = Field(True, description="go as far along the last change as the probe did along its own")
    slope_max: float = Field(1.5, ge=1, description="most that slope takes of the last change between computed steps")
    warmup_steps: int = Field(4, ge=0, description="computed steps at the start")
    cooldown_steps: int = Field(1, ge=0, description="computed steps at the end")

    @model_validator(mode="after")
    def _one_forecast(self) -> DiCache:
        if self.slope and (self.predictor not in ("adams_bashforth", "taylor") or self.order != 2):
            raise ValueError(
                f'predictor = "{self.predictor}" with order = {self.order}: slope goes along the line through two '
                "values; set slope = false for any other"
            )
        return self

    def change(self, step: Step, memory: Memory) -> Tensor:
        assert memory.probe is not None and memory.previous is not None
        return memory.drift + relative_change(memory.probe, memory.previous)

    def weigher(self, run: Run) -> Weigh:
        """With `slope` the largest factors that it may have: what values must not leave their dtype with."""
        if not self.slope:
            return super().weigher(run)
        most = 1 + self.damping * (self.slope_max - 1)
        return lambda index, anchors: [1 - most, most] if len(anchors) > 1 else [1.0]

    def forecast(self, factors: Sequence[float], memory: Memory, agree: Agree | None) -> list[Any]:
        if not self.slope or len(memory.values) < 2 or memory.probe is None:
            return super().forecast(factors, memory, agree)
        before, last = memory.probes
        sizes = _size(memory.probe - before), _size(last - before)
        whole, gap = sizes if agree is None else map(agree, sizes)
        slope = (whole / gap.clamp_min(torch.finfo(torch.float32).tiny)).clamp(1, self.slope_max)
        share = self.damping * (slope - 1)
        pairs = zip(*memory.values[-2:], strict=True)
        return [_further(old, new, share) if isinstance(new, Tensor) else new for old, new in pairs]


def _size(difference: Tensor) -> Tensor:
    return difference.abs().mean(dtype=torch.float32)


def _further(before: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """last + share * (last - before), worked out in float32."""
    wide = torch.promote_types(last.dtype, torch.float32)
    return (last.to(wide) + share * (last.to(wide) - before.to(wide))).to(last.dtype)
