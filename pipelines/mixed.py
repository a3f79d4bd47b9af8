"""Bits by layer for a live pipeline: hear its denoisers, measure their layers, choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdiff.quant.schemes.mixed import Mixed

from .calibrate import Watch
from .hearing import hear_each, planned


def plan_bits(
    pipe: Any, method: Mixed, prompts: Sequence[str], *, moments: int = 4, seed: int = 0, batch: int = 4,
    watch: Watch | None = None, **call: Any,
) -> Mixed:  # fmt: skip
    """The method with a plan for the pipeline's denoiser, or one for each of them; they stay as they are.

    Draws `prompts` once with the pipeline's arguments `call`; the layers are measured on the calls heard at `moments`
    steps spread over the runs, in all branches. `watch` is told how many layers of how many are done.
    """
    heard = hear_each(pipe, prompts, moments=moments, seed=seed, batch=batch, **call)
    return method.model_copy(update={"plan": planned(heard, lambda calls: method.planned(calls, watch))})
