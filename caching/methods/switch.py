"""Switching between two denoisers by step: the multi-UNet switching of A-SDM. Paper: https://arxiv.org/abs/2406.00210.

Only the abstract was at hand: which steps whose are is a setting, and both models are the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any, Literal

from pydantic import ConfigDict, Field
from torch import nn

from fastdiff.anatomy import Anatomy
from fastdiff.caching.another import AnotherModel
from fastdiff.caching.base import CacheMethod, Forward, Span
from fastdiff.caching.protocols import Live
from fastdiff.caching.region import Region
from fastdiff.clock import Run
from fastdiff.errors import BadConfig


class Switch(CacheMethod):
    """Run another denoiser in the place of the pipeline's own in some steps: a smaller, pruned or quantized one.

    Its steps count as cached in the report, since the pipeline's own denoiser is left out. Nothing is remembered from
    one step to another, so that predictors have nothing to do.

    Formula: e_i = second(x_i, t_i) for the steps i from between[0] to between[1] of the run, else own(x_i, t_i).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    method: Literal["switch"] = "switch"
    second: AnotherModel = Field(description="the other denoiser: a module, or the directory of it or of its pipeline")
    between: Span = Field((0.5, 1.0), description="shares of the run between which the second denoiser runs")

    @property
    def unverifiable(self) -> str | None:
        return "switch makes no forecasts that could be checked"

    def regions(self, anatomy: Anatomy) -> list[Region]:
        """Nothing of the denoiser is cached."""
        return []

    def own_steps(self, run: Run) -> list[bool]:
        """True for each step of the pipeline's own denoiser, the guards on it."""
        start, stop = (round(share * run.total) for share in self.between)
        wished = [not start <= index < stop for index in range(run.total)]
        guarded: Sequence[bool] = self.with_guards(wished)
        first = wished[:1] if self.warmup_steps == 0 else guarded[:1]  # no value is needed to begin with
        return [*first, *guarded[1:]]

    def around(self, forward: Forward, session: Live) -> Forward:
        """The second denoiser's forward at its steps."""
        second = self.second
        if not isinstance(second, nn.Module):
            raise BadConfig(f"the second denoiser was not read from {second!r}")
        masks: dict[int, list[bool]] = {}  # of the present run, by its number

        @wraps(forward)
        def switched(*args: Any, **kwargs: Any) -> Any:
            step = session.clock.now
            assert step is not None
            if step.run.number not in masks:
                masks.clear()
                masks[step.run.number] = self.own_steps(step.run)
            if masks[step.run.number][step.index]:
                return forward(*args, **kwargs)
            session.recorder.skipped()
            return second(*args, **kwargs)

        return switched
