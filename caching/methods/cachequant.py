"""CacheQuant: Comprehensively Accelerated Diffusion Models. Paper: https://arxiv.org/abs/2503.01323 (CVPR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from fastdiff.affine import Affine, AffineFit, corrected
from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Correct
from fastdiff.caching.calibration import Shadow
from fastdiff.caching.plan import Schedule, from_file
from fastdiff.caching.protocols import Calibrator
from fastdiff.caching.region import Region
from fastdiff.caching.schedule import Costs, optimal_steps
from fastdiff.caching.sites import Site, at
from fastdiff.caching.trace import SiteTrace
from fastdiff.clock import Run, Step
from fastdiff.errors import BadConfig


class Corrected(Schedule):
    """A schedule and, by step and stream, what is made of a cached value: a scale and a shift for each channel.

    `layers` are the same for the outputs of quantized layers that the cached value feeds, by path and step.
    """

    affine: Mapping[int, Mapping[int, Affine]] = Field(default_factory=dict)
    layers: Mapping[str, Mapping[int, Affine]] = Field(default_factory=dict)

    def summary(self) -> str:
        fed = f", and for {len(self.layers)} quantized layers" if self.layers else ""
        return f"{super().summary()}; corrections for {len(self.affine)} cached steps{fed}"


class CacheQuant(CacheMethod):
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
    site: Site = Field("auto", description="what a cached step leaves out")
    branch: int = Field(0, ge=0, description="skip connection to split at (a UNet's inside)")
    live_blocks: int = Field(0, ge=0, description="blocks that always run (a transformer's stack)")
    correct: bool = Field(True, description="apply the correction by channel")
    ridge: float = Field(0.02, ge=0, description="how much calibrate pulls the scales of channels to 1")
    plan: Annotated[Corrected | None, from_file(Corrected)] = Field(
        None, description="what calibrate found, or the path of its file"
    )

    def regions(self, anatomy: Anatomy) -> list[Region]:
        self._plan.check_model(anatomy)
        return [self._region(anatomy)]

    def _region(self, anatomy: Anatomy) -> Region:
        return at(self.site, anatomy, live=self.live_blocks, branch=self.branch)

    def mask(self, run: Run, region: Region) -> list[bool]:
        steps = set(self._plan.steps(run))
        return [i in steps for i in range(run.total)]

    def corrector(self, run: Run, number: int) -> Correct | None:
        known = self._plan.affine if self.correct and self._plan.fits(run) else {}
        if not known:
            return None

        decoded = {(index, leaf): pair.tensors() for index, pairs in known.items() for leaf, pair in pairs.items()}

        def correct(index: int, leaf: int, value: Tensor) -> Tensor:
            if (index, leaf) not in decoded:
                return value
            scale, shift = decoded[index, leaf]
            if scale.device != value.device:
                scale, shift = decoded[index, leaf] = scale.to(value.device), shift.to(value.device)
            return corrected(value, scale, shift)

        return correct

    def notes(self, run: Run, anatomy: Anatomy) -> list[str]:
        said = self._plan.differences(run, anatomy)
        if self.correct and self._plan.affine and not self._plan.fits(run):
            said.append("the correction by channel is left out: it holds for the steps of the plan only")
        return said

    @property
    def _plan(self) -> Corrected:
        if self.plan is None:
            raise BadConfig(
                "the cache method cachequant needs a plan: make one with fastdiff calibrate, and name it as `plan`"
            )
        return self.plan

    def calibrated(self, calibrator: Calibrator) -> CacheQuant:
        """Two passes: the schedule from an uncached trace of the site, then the correction on the cached trajectory."""
        trace = SiteTrace()
        run = calibrator.observe(self, trace.seen, regions=[self._region(calibrator.anatomy)])
        costs = Costs(trace.gram, super().weigher(run), longest=2 * self.interval - 1)
        forced = [i for i in range(run.total) if self.guarded(False, i, run.total)]
        budget = len(forced) - 1 + math.ceil((run.total - len(forced) + 1) / self.interval)
        steps = optimal_steps(costs.table(), budget, forced, shortest=math.ceil(self.interval / 2))
        plan = Corrected(**calibrator.origin(run), compute=tuple(steps), error=costs.error(steps))
        planned = self.model_copy(update={"plan": plan})
        return planned._fitted(calibrator) if self.correct else planned

    def _fitted(self, calibrator: Calibrator) -> CacheQuant:
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

        calibrator.draw(lambda anatomy, clock, recorder: Shadow(self, anatomy, clock, recorder, seen))
        affine: dict[int, dict[int, Affine]] = {}
        for (index, leaf), fit in sorted(fits.items()):
            affine.setdefault(index, {})[leaf] = Affine.of(*fit.solve())
        plan = self._plan.model_copy(update={"affine": affine})
        return self.model_copy(update={"plan": plan})
