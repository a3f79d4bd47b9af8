"""What no splitting saves, as fitted to DistriFusion's published table (https://arxiv.org/abs/2402.19481)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overhead:
    """Seconds a step that no splitting saves (launches, small kernels, copies), for a picture of so many pixels."""

    fixed: float = 0.0
    per_pixel: float = 0.0

    def of(self, pixels: int) -> float:
        return self.fixed + self.per_pixel * pixels


A100 = Overhead(0.015, 7.6e-3 / 2**20)  # least error over DistriFusion's published SDXL table
