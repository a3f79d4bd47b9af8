"""Calls of a tiny pipeline's denoisers, and what is planned on them."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastdiff.pipelines.hearing import hear_each, planned
from fastdiff.pipelines.planning import plan
from fastdiff.quant.calls import Calls
from fastdiff.quant.pruning import prune
from fastdiff.quant.schemes.mixed import Mixed


def hear(pipe: Any, prompts: list[str], **how: Any) -> Calls:
    """Calls of the main denoiser."""
    return next(iter(hear_each(pipe, prompts, **how).values()))


def plan_bits(pipe: Any, method: Mixed, prompts: list[str], **how: Any) -> Mixed:
    """The method with its plan."""
    return method.model_copy(update={"plan": plan(pipe, method, prompts, **how)})


def plan_pruning(
    pipe: Any, prompts: list[str], *, max_error: float, rank: int = 0, protect: float = 0.0, **how: Any
) -> Any:
    """What may be removed within a relative squared error."""
    made = partial(prune, max_error=max_error, rank=rank, protect=protect)
    return planned(hear_each(pipe, prompts, **how), made)
