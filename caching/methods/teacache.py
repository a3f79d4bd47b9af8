"""TeaCache: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model. Paper: https://arxiv.org/abs/2411.19108."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Gated, relative_change
from fastdiff.caching.plan import PLAN, Plan, from_file
from fastdiff.caching.planned import Planned
from fastdiff.caching.protocols import Calibrator, Passes, Sample
from fastdiff.caching.region import Memory, Region, tensors
from fastdiff.caching.sites import attention_input, block_stack
from fastdiff.clock import Step
from fastdiff.plans import Each


class Rescaling(Plan):
    """The polynomial that calibrate fitted, and how much of the output's change it explains."""

    coefficients: tuple[float, ...] = Field(min_length=1, max_length=8)
    r_squared: float

    def summary(self) -> str:
        return f"a polynomial of degree {len(self.coefficients) - 1} that explains {self.r_squared:.1%} of the changes"


class TeaCache(Planned, Gated):
    """Skip until the changes of the modulated input of the first attention layer add up to the threshold.

    Formula: skipped while the sum over skipped steps of |p(mean |m_i - m_(i-1)| / mean |m_(i-1)|)| stays below
    `threshold`, m the probed input, p the polynomial.
    """

    method: Literal["teacache"] = "teacache"
    threshold: float = Field(0.15, ge=0, description="sum of rescaled changes from which on a step is computed")
    coefficients: tuple[float, ...] = Field(
        (1.0, 0.0), min_length=1, max_length=8,
        description="polynomial from input change to output change, highest power first, where there is no plan",
    )  # fmt: skip
    plan: Annotated[Rescaling | Each[Rescaling] | None, from_file(Rescaling)] = Field(None, description=PLAN)
    cooldown_steps: int = Field(1, ge=0, description="computed steps at the end")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        if self.plan is not None:
            self.found.check_model(anatomy)
        return [block_stack(anatomy, 1, probe=attention_input(anatomy))]

    def change(self, step: Step, memory: Memory) -> Tensor:
        assert memory.probe is not None and memory.previous is not None
        moved = relative_change(memory.probe, memory.previous)
        rescaled = moved * 0
        for coefficient in self.coefficients if self.plan is None else self.found.coefficients:
            rescaled = rescaled * moved + coefficient
        return memory.drift + rescaled.abs()

    def calibrated(self, calibrator: Calibrator) -> Passes:
        """Fits the polynomial from the probe's change to that of what the blocks add, as the authors do offline."""
        last: dict[int, Sample] = {}
        pairs: list[tuple[float, float]] = []

        def seen(sample: Sample) -> None:
            before, last[sample.step.branch] = last.get(sample.step.branch), sample
            if before is None or before.step.run is not sample.step.run:
                return
            if sample.probe is not None and before.probe is not None:
                moved = relative_change(sample.probe, before.probe)
                given, gave = tensors(sample.value)[0], tensors(before.value)[0]
                pairs.append((float(moved), float(relative_change(given, gave))))

        run = yield from calibrator.observe(self, seen)
        x, y = np.array(pairs).T if len(pairs) > 2 else (np.zeros(0), np.zeros(0))
        if len(x) == 0 or not np.isfinite(x + y).all():
            raise ValueError("too few steps, or changes that are no finite numbers, to fit a polynomial to")
        found = np.polyfit(x, y, min(4, len(set(x)) - 1))
        left, whole = float(((np.polyval(found, x) - y) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
        plan = Rescaling(
            **calibrator.origin(run),
            coefficients=tuple(map(float, found)),
            r_squared=1 - left / whole if whole else 1.0,
        )
        return self.with_plan(plan)
