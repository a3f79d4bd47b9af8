"""T-GATE: Faster Diffusion via Temporal Attention Decomposition. Paper: https://arxiv.org/abs/2404.02747."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Forward, every
from fastdiff.caching.guidance import GuidanceGate
from fastdiff.caching.protocols import Live
from fastdiff.caching.region import Region
from fastdiff.caching.sites import sublayers
from fastdiff.clock import Run
from fastdiff.errors import UnsupportedModel


class TGate(CacheMethod):
    """After the gate, cross-attention is frozen and the unconditional half of guidance is no longer computed.

    guidance: "drop" takes the conditional output alone, as the paper does; "delta" (ours) keeps the last difference of
    the two halves, so that guidance goes on; "keep" computes both.

    Formula: for i >= `gate` T: cross-attention gives what it gave last; e_i = c_i (drop), or c_i + (u_j - c_j) in
    the place of the unconditional u_i (delta), with conditional c and j the last step with both.
    """

    method: Literal["tgate"] = "tgate"
    gate: float = Field(0.4, ge=0, le=1, description="share of the run after which the gate closes")
    guidance: Literal["drop", "delta", "keep"] = Field("drop", description="what becomes of guidance after the gate")
    self_interval: int = Field(1, ge=1, description="before the gate, compute self-attention every so many steps")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        try:
            found = sublayers(anatomy)
        except UnsupportedModel:
            found = []
        wanted = ("cross", "self") if self.self_interval > 1 else ("cross",)
        chosen = [region for region in found if region.kind in wanted]
        if not chosen and self.guidance == "keep":
            raise UnsupportedModel(
                f'{anatomy.family.name} has no cross-attention; tgate needs guidance = "drop" or "delta"'
            )
        return chosen

    def mask(self, run: Run, region: Region) -> list[bool]:
        gate = self.closes(run)
        if region.kind == "self":
            regular = every(self.self_interval, run, max(self.warmup_steps, 2))
            return [wanted or i >= gate for i, wanted in enumerate(regular)]
        return [i < gate for i in range(run.total)]

    def closes(self, run: Run) -> int:
        """The first step after the gate."""
        return round(self.gate * run.total)

    def gated(self, run: Run, index: int) -> bool:
        """Whether guidance is left out at a step."""
        gate = self.closes(run)
        return not self.with_guards([i < gate for i in range(run.total)])[index]

    def around(self, forward: Forward, session: Live) -> Forward:
        return (
            forward
            if self.guidance == "keep"
            else GuidanceGate(self.gated, self.order, session, forward, self.guidance == "delta")
        )
