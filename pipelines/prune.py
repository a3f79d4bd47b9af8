"""Depth pruning of a live pipeline: hear its denoiser, find what is free, write the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.pruning import prune

from .calibrate import hear
from .families import anatomies


def plan_pruning(
    pipe: Any, prompts: Sequence[str], *, max_error: float = 1e-3, rank: int = 0, ridge: float = 1e-3, moments: int = 4,
    seed: int = 0, batch: int = 4, watch: Callable[[int, int], None] | None = None, **call: Any,
) -> PrunePlan:  # fmt: skip
    """What can be removed from the pipeline's first denoiser within `max_error`, the relative squared error of outputs.

    Draws `prompts` once with the pipeline's arguments `call`, then measures on the calls heard; the pipeline itself is
    not changed. Save `plan.model_dump_json()` to a file and name it as `quant.prune`.
    """
    calls = hear(pipe, prompts, moments=moments, seed=seed, batch=batch, **call)
    return prune(anatomies(pipe)[0], calls, max_error=max_error, ridge=ridge, rank=rank, watch=watch)
