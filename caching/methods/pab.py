"""PAB, pyramid attention broadcast. Paper: https://arxiv.org/abs/2408.12588 (ICLR 2025)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Span
from fastdiff.caching.region import Region
from fastdiff.caching.sites import sublayers
from fastdiff.clock import Run


class PAB(CacheMethod):
    """Broadcast attention outputs over a range of steps: self-attention often, temporal less, cross rarely computed.

    Formula: within `between`, attention of a kind is computed at every n-th step, n its interval, and f_i = f_j in
    between.
    """

    method: Literal["pab"] = "pab"
    self_interval: int = Field(2, ge=1, description="compute self-attention every so many steps of the range")
    temporal_interval: int = Field(4, ge=1, description="compute attention between frames every so many steps")
    cross_interval: int = Field(6, ge=1, description="compute cross-attention every so many steps")
    between: Span = Field(
        (0.1, 0.8), description="range of timesteps, as shares of the noisiest, in which outputs are broadcast"
    )

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [region for region in sublayers(anatomy) if region.kind != "ff"]

    def mask(self, run: Run, region: Region) -> list[bool]:
        known = {"self": self.self_interval, "temporal": self.temporal_interval, "cross": self.cross_interval}
        interval = known[region.kind]
        top = 1000.0 if max(run.timesteps) > 1 else 1.0
        inside = [self.between[0] <= t / top <= self.between[1] for t in run.timesteps]
        first = inside.index(True) if True in inside else 0
        return [not here or (i - first) % interval == 0 for i, here in enumerate(inside)]
