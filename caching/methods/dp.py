"""Ours: the optimal steps for a predictor, found by dynamic programming on a trace. Related: https://arxiv.org/abs/2602.22654."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Weigh
from fastdiff.caching.calibration import Recording
from fastdiff.caching.plan import Schedule, from_file
from fastdiff.caching.predictors import Axis
from fastdiff.caching.protocols import Calibrator
from fastdiff.caching.region import Region
from fastdiff.caching.schedule import Costs, fewest, optimal_steps, spans
from fastdiff.caching.session import Session
from fastdiff.caching.sites import Site, at
from fastdiff.caching.trace import SiteTrace, Trace, influence
from fastdiff.clock import Run, StepClock
from fastdiff.errors import BadConfig
from fastdiff.recorder import Recorder


class DP(CacheMethod):
    """Compute the steps of a calibrated plan, the best ones for this model and solver; predict the others' outputs.

    A run on other noise levels (step count, img2img strength, scheduler) computes the same share of its steps, spread
    over the noise levels as in the plan, takes the predictor's own weights, and says so.

    Formula: of all sets of `computed_steps` steps the one with the least sum over groups of |sum_i c_i (p_i -
    v_i)|^2; a group is the skipped steps between two computed ones, p_i the prediction from the steps computed
    before i, c_i how much the solver makes of an error at step i in the final latents (its impulse response).
    """

    method: Literal["dp"] = "dp"
    predictor: str = "adams_bashforth"
    coordinate: Axis = Field("logsnr", description="axis on which predictions extrapolate")
    computed_steps: int = Field(20, ge=1, description="steps to compute; what calibrate plans for")
    site: Site = Field("output", description="what a skipped step leaves out and predicts")
    branch: int = Field(0, ge=0, description="skip connection to split at (site inner)")
    live_blocks: int = Field(1, ge=0, description="blocks that always run (site stack)")
    longest: int = Field(8, ge=1, description="longest run of skipped steps calibrate may plan")
    ridge: float | None = Field(
        None, ge=0, description="fit weights to the trace, pulled this much to the predictor's; None: the predictor's"
    )
    plan: Annotated[Schedule | None, from_file(Schedule)] = Field(
        None, description="what calibrate found, or the path of its file"
    )

    @property
    def history(self) -> int:
        """Weights fitted to the trace may use values that the predictor does not."""
        return self.order

    def regions(self, anatomy: Anatomy) -> list[Region]:
        self._plan.check_model(anatomy)
        return [self._region(anatomy)]

    def _region(self, anatomy: Anatomy) -> Region:
        return at(self.site, anatomy, live=self.live_blocks, branch=self.branch)

    def mask(self, run: Run, region: Region) -> list[bool]:
        steps = set(self._plan.steps(run))
        return [i in steps for i in range(run.total)]

    def weigher(self, run: Run) -> Weigh:
        usual = super().weigher(run)
        plan = self._plan.weights if self._plan.fits(run) else {}

        def weigh(index: int, anchors: Sequence[int]) -> Sequence[float]:
            planned = dict(plan.get(index, ()))
            if planned and max(planned) == anchors[-1] and set(planned) <= set(anchors):
                return [planned.get(anchor, 0.0) for anchor in anchors]
            return usual(index, anchors)

        return weigh

    def notes(self, run: Run, anatomy: Anatomy) -> list[str]:
        return self._plan.differences(run, anatomy)

    @property
    def _plan(self) -> Schedule:
        if self.plan is None:
            raise BadConfig("the cache method dp needs a plan: make one with fastdiff calibrate, and name it as `plan`")
        return self.plan

    def check(self, run: Run) -> None:
        """Raises BadConfig if a run like this cannot have so many computed steps."""
        least = fewest(run.total, self._longest, self._forced(run))
        if not least <= self.computed_steps <= run.total:
            raise BadConfig(
                f"computed_steps = {self.computed_steps}: a run of {run.total} takes {least} to {run.total}"
            )

    def calibrated(self, calibrator: Calibrator) -> DP:
        traces: list[Trace] = []
        inside = None if self.site == "output" else SiteTrace()

        def install(anatomy: Anatomy, clock: StepClock, recorder: Recorder) -> Session | None:
            traces.append(Trace(clock))
            clock.on_start.append(self.check)
            if inside is None:
                return None
            return Recording(self, anatomy, clock, recorder, inside.seen, [self._region(anatomy)])

        calibrator.draw(install)
        return self.planned(traces[0], calibrator, inside)

    def planned(self, trace: Trace, calibrator: Calibrator, inside: SiteTrace | None = None) -> DP:
        """This method with the plan of least predicted error, of what is cached `inside`, or else of the outputs.

        The dynamic program predicts from the last two computed steps; a higher order takes part in the weights of the
        plan. An error inside counts as much for the final latents as the output of its step would. Raises ValueError
        where no plan is possible.
        """
        run, gram = trace.run, trace.gram
        if run is None or gram is None:
            raise ValueError("no complete run was traced")
        gram = gram if inside is None else inside.gram
        if not np.isfinite(gram).all():
            raise ValueError("the model's outputs are not finite numbers; try another dtype or guidance scale")
        self.check(run)
        costs = Costs(gram, super().weigher(run), influence(trace.solver, run), ridge=self.ridge, longest=self._longest)
        steps = optimal_steps(costs.table(), self.computed_steps, self._forced(run))
        groups = spans(steps, run.total)
        plan = Schedule(
            **calibrator.origin(run),
            compute=tuple(steps),
            weights={k: costs.weights(k, known) for known, end in groups for k in range(known[-1] + 1, end)},
            error=costs.error(steps),
        )
        return self.model_copy(update={"plan": plan})

    @property
    def _longest(self) -> int:
        return min(self.longest, self.max_consecutive_cached or self.longest)

    def _forced(self, run: Run) -> list[int]:
        return [i for i in range(run.total) if self.guarded(False, i, run.total)]
