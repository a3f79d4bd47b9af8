"""Depth pruning of a live pipeline: hear its denoisers, find what is free, write the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdiff.plans import Each
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.pruning import prune

from .calibrate import Watch
from .hearing import hear_each, planned


def plan_pruning(
    pipe: Any, prompts: Sequence[str], *, max_error: float = 1e-3, rank: int = 0, ridge: float = 1e-3, moments: int = 4,
    seed: int = 0, batch: int = 4, watch: Watch | None = None, **call: Any,
) -> PrunePlan | Each[PrunePlan]:  # fmt: skip
    """What can be removed from the pipeline's denoiser, or from each of them, within `max_error`, the relative squared
    error of its outputs.

    Draws `prompts` once with the pipeline's arguments `call`, then measures on the calls heard; the pipeline itself is
    not changed. Save `plan.model_dump_json()` to a file and name it as `quant.prune`.
    """
    heard = hear_each(pipe, prompts, moments=moments, seed=seed, batch=batch, **call)
    return planned(heard, lambda calls: prune(calls, max_error=max_error, ridge=ridge, rank=rank, watch=watch))
