"""Bits by layer for a live pipeline: hear its denoiser, measure its layers, choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdiff.quant.schemes.mixed import Mixed

from .calibrate import hear
from .families import anatomies


def plan_bits(
    pipe: Any, method: Mixed, prompts: Sequence[str], *, moments: int = 4, seed: int = 0, batch: int = 4,
    watch: Callable[[int, int], None] | None = None, **call: Any,
) -> Mixed:  # fmt: skip
    """The method with a plan for the pipeline's first denoiser, which stays as it is.

    Draws `prompts` once with the pipeline's arguments `call`; the layers are measured on the calls heard at `moments`
    steps spread over the runs, in all branches. `watch` is told how many layers of how many are done.
    """
    calls = hear(pipe, prompts, moments=moments, seed=seed, batch=batch, **call)
    return method.planned(anatomies(pipe)[0], calls, watch)
