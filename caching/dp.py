"""Ours: the optimal steps for a predictor, found by dynamic programming on a trace. Related: https://arxiv.org/abs/2602.22654."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run
from fastdiff.errors import BadConfig
from fastdiff.method import Settings

from .base import CacheMethod
from .region import Region
from .sites import model_output


class Plan(Settings):
    """What calibration found. `weights[step]` are the (computed step, factor) pairs that make a skipped output."""

    version: Literal[1] = 1
    denoiser: str = Field(max_length=200, description="class and configuration the trace was made on")
    scheduler: str = Field(max_length=200)
    guidance_scale: float | None = None
    sigmas: tuple[float, ...] = Field(max_length=10_000)
    compute: tuple[int, ...] = Field(min_length=1, max_length=10_000)
    weights: Mapping[int, tuple[tuple[int, float], ...]] = Field(default_factory=dict)

    @field_validator("compute")
    @classmethod
    def _in_order(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)) or steps[0] != 0:
            raise ValueError("a plan's computed steps start with 0 and rise")
        return steps


class DP(CacheMethod):
    """Compute the steps of a calibrated plan; predict the rest with its fitted weights.

    A run on another grid (step count, img2img strength, scheduler) uses the plan's steps at the nearest noise levels,
    the same share of the run, and Lagrange weights, and says so.
    """

    method: Literal["dp"] = "dp"
    predictor: str = "adams_bashforth"
    computed_steps: int = Field(20, ge=1, description="steps to compute; what calibrate plans for")
    longest: int = Field(8, ge=1, description="longest run of skipped steps calibrate may plan")
    ridge: float | None = Field(None, ge=0, description="fit weights, pulled this much to Lagrange's; None: Lagrange")
    plan: Plan | None = Field(None, description="what calibrate found, or the path of its file")

    @field_validator("plan", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        path = Path(value)
        if not path.is_file():
            raise ValueError(f"plan file {str(path)!r} does not exist; make one with fastdiff calibrate")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"plan file {str(path)!r} cannot be read: {error}") from None

    def regions(self, anatomy: Anatomy) -> list[Region]:
        if self.plan is None:
            raise BadConfig("the cache method dp needs a plan; make one with fastdiff calibrate")
        found = fingerprint(anatomy)
        if self.plan.denoiser != found:
            raise BadConfig(f"the plan was made for {self.plan.denoiser}, not for {found}; calibrate this model")
        return [model_output(anatomy)]

    def mask(self, run: Run) -> list[bool]:
        assert self.plan is not None
        steps = set(self.plan.compute if self._same_grid(run) else remapped(self.plan, run))
        return [i in steps for i in range(run.total)]

    def weights(self, run: Run, index: int, anchors: Sequence[int]) -> list[float]:
        assert self.plan is not None
        fitted = dict(self.plan.weights.get(index, ())) if self._same_grid(run) else {}
        if fitted and set(fitted) <= set(anchors):
            return [fitted.get(anchor, 0.0) for anchor in anchors]
        return super().weights(run, index, anchors)

    def notes(self, run: Run) -> list[str]:
        assert self.plan is not None
        if self._same_grid(run):
            return []
        return [f"plan of {len(self.plan.sigmas)} steps re-mapped to other noise levels, {run.total} steps"]

    def _same_grid(self, run: Run) -> bool:
        assert self.plan is not None
        planned = self.plan.sigmas
        return len(planned) == run.total and all(
            abs(a - b) <= 1e-4 * max(1.0, abs(a)) for a, b in zip(planned, run.sigmas, strict=True)
        )


def remapped(plan: Plan, run: Run) -> list[int]:
    """The same share of computed steps, spread over the noise levels as in the plan; step 0 always."""
    count = max(1, min(run.total, round(len(plan.compute) * run.total / len(plan.sigmas))))
    wanted = [plan.sigmas[plan.compute[round(k * (len(plan.compute) - 1) / max(1, count - 1))]] for k in range(count)]
    free, chosen = set(range(run.total)), [0]
    free.discard(0)
    for sigma in wanted[1:]:
        best = min(free, key=lambda i: (abs(run.sigmas[i] - sigma), i))
        free.discard(best)
        chosen.append(best)
    return sorted(chosen)


def fingerprint(anatomy: Anatomy) -> str:
    """Class and size of a denoiser, enough to tell a plan's model from another."""
    parameters = sum(p.numel() for p in anatomy.denoiser.parameters())
    return f"{type(anatomy.denoiser).__name__} with {parameters} parameters"
