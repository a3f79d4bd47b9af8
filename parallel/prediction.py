"""What a plan says of one method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One method on one mesh; of the rank that takes longest. `refused` says why not."""

    method: str
    settings: dict[str, Any]
    mesh: tuple[int, int, int] | None = None
    exact: bool = False
    rank_seconds: float = 0.0  # measured here, or from the share of operations
    counted_bytes_warmup: int = 0
    counted_bytes: int = 0
    counted_kinds: dict[str, int] | None = None
    predicted_step_seconds: float = math.inf
    predicted_seconds: float = math.inf
    predicted_speedup: float = 0.0
    predicted_memory: int = 0
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON has no infinity: what was not predicted is left out."""
        return {k: v for k, v in asdict(self).items() if v is not None and v != math.inf}
