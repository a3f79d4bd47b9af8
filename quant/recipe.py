"""How one layer is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .rounding import Rounding

Activations = Literal["none", "int8", "fp8"]
Speed = Literal["never slower", "fastest", "smallest"]


@dataclass(frozen=True)
class Recipe:
    """Names a format of `packing` and a kernel; `low_rank` is the rank of a residual, `speed` what the clock chooses
    from: "smallest" does not ask it."""

    format: str
    activations: Activations = "none"
    group: int = 64
    rounding: Rounding = "mse"
    low_rank: int = 0
    kernel: str = "auto"
    speed: Speed = "smallest"
