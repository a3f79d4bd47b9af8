"""CacheQuant: Comprehensively Accelerated Diffusion Models. Paper: https://arxiv.org/abs/2503.01323 (CVPR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from fastdiff.affine import Affine, AffineFit, corrected
from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Correct
from fastdiff.caching.calibration import Shadow
from fastdiff.caching.plan import PLAN, Schedule, from_file
from fastdiff.caching.planned import Scheduled
from fastdiff.caching.protocols import Calibrator, Passes
from fastdiff.caching.schedule import Costs, optimal_steps
from fastdiff.caching.trace import SiteTrace
from fastdiff.clock import Run, Step
from fastdiff.plans import Each


class Corrected(Schedule):
    """A schedule and, by step and stream, what is made of a cached value: a scale and a shift for each channel.

    `layers` are the same for the outputs of quantized layers that the cached value feeds, by path and step.
    """

    affine: Mapping[int, Mapping[int, Affine]] = Field(default_factory=dict)
    layers: Mapping[str, Mapping[int, Affine]] = Field(default_factory=dict)

    def summary(self) -> str:
        fed = f", and for {len(self.layers)} quantized layers" if self.layers else ""
        return f"{super().summary()}; corrections for {len(self.affine)} cached steps{fed}"


class CacheQuant(Scheduled):
    """Compute the steps that a dynamic program picks on the cached feature itself; correct it channel by channel.

    Groups hold between half and twice `interval` steps. Unlike the authors' code, the program's cost is that of the
    predictor in use, and the correction is fitted on the cached trajectory, whose errors it meets. With quantization
    on, all of it is calibrated on the quantized model, and the outputs of the layers that a cached value feeds are
    corrected too.

    Formula: v_i = a_i * v_j + b_i, with j the last computed step, and a scale and a shift for each channel and
    step, fitted by least squares with `ridge`.
    """

    method: Literal["cachequant"] = "cachequant"
    interval: int = Field(3, ge=1, description="mean steps in a group; what calibrate plans for")
    correct: bool = Field(True, description="apply the correction by channel")
    ridge: float = Field(0.02, ge=0, description="how much calibrate pulls the scales of channels to 1")
    plan: Annotated[Corrected | Each[Corrected] | None, from_file(Corrected)] = Field(None, description=PLAN)

    def corrector(self, run: Run, number: int) -> Correct | None:
        known = self.found.affine if self.correct and self.found.fits(run) else {}
        if not known:
            return None
        there = {  # before the steps, in which a copy would be a wait
            (index, leaf): [numbers.to(run.device) for numbers in pair.tensors()]
            for index, pairs in known.items() for leaf, pair in pairs.items()
        }  # fmt: skip

        def correct(index: int, leaf: int, value: Tensor) -> Tensor:
            return corrected(value, *there[index, leaf]) if (index, leaf) in there else value

        return correct

    def notes(self, run: Run, anatomy: Anatomy) -> list[str]:
        said = super().notes(run, anatomy)
        if self.correct and self.found.affine and not self.found.fits(run):
            said.append("the correction by channel is left out: it holds for the steps of the plan only")
        return said

    def calibrated(self, calibrator: Calibrator) -> Passes:
        """Two passes: the schedule from an uncached trace of the site, then the correction on the cached trajectory."""
        trace = SiteTrace()
        run = yield from calibrator.observe(self, trace.seen, regions=[self.region(calibrator.anatomy)])
        gram, steps = trace.gram, trace.steps
        costs = Costs(gram, super().weigher(run.only(steps)), longest=2 * self.interval - 1)
        forced = self.forced(run, steps)
        budget = len(forced) - 1 + math.ceil((len(steps) - len(forced) + 1) / self.interval)
        chosen = optimal_steps(costs.table(), budget, forced, shortest=math.ceil(self.interval / 2))
        planned = self.with_plan(self.schedule(Corrected, calibrator, steps, costs, chosen, trace))
        if not self.correct:
            return planned
        return (yield from planned._fitted())

    def _fitted(self) -> Passes:
        fits: dict[tuple[int, int], AffineFit] = {}

        def seen(step: Step, _number: int, predicted: list[Any], truth: list[Any]) -> list[Any]:
            """The correction as known so far, this call included, is what the model goes on with."""
            out = list(predicted)
            for leaf, (x, y) in enumerate(zip(predicted, truth, strict=True)):
                if isinstance(x, Tensor):
                    fit = fits.setdefault((step.index, leaf), AffineFit(self.ridge))
                    fit.add(x, y)
                    out[leaf] = corrected(x, *fit.solve())
            return out

        yield lambda anatomy, clock, recorder: Shadow(self, anatomy, clock, recorder, seen)
        affine: dict[int, dict[int, Affine]] = {}
        for (index, leaf), fit in sorted(fits.items()):
            affine.setdefault(index, {})[leaf] = Affine.of(*fit.solve())
        return self.with_plan(self.found.model_copy(update={"affine": affine}))
