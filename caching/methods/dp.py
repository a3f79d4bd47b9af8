"""Ours: the optimal steps for a predictor, found by dynamic programming on a trace. Related: https://arxiv.org/abs/2602.22654."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Weigh
from fastdiff.caching.calibration import Recording
from fastdiff.caching.plan import PLAN, Schedule, from_file
from fastdiff.caching.planned import Scheduled
from fastdiff.caching.predictors import Axis
from fastdiff.caching.protocols import Calibrator, Passes
from fastdiff.caching.schedule import Costs, Floats, fewest, optimal_steps, shared_steps, spans
from fastdiff.caching.session import Session
from fastdiff.caching.sites import Site
from fastdiff.caching.trace import SiteTrace, Trace, influence
from fastdiff.clock import Run, StepClock
from fastdiff.errors import BadConfig
from fastdiff.plans import Each
from fastdiff.recorder import Recorder


class DP(Scheduled):
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
    live_blocks: int = Field(1, ge=0, description="blocks that always run (site stack)")
    longest: int = Field(8, ge=1, description="longest run of skipped steps calibrate may plan")
    ridge: float | None = Field(
        None, ge=0, description="fit weights to the trace, pulled this much to the predictor's; None: the predictor's"
    )
    plan: Annotated[Schedule | Each[Schedule] | None, from_file(Schedule)] = Field(None, description=PLAN)

    @property
    def history(self) -> int:
        """Weights fitted to the trace may use values that the predictor does not."""
        return self.order

    def weigher(self, run: Run) -> Weigh:
        usual = super().weigher(run)
        plan = self.found.weights if self.found.fits(run) else {}

        def weigh(index: int, anchors: Sequence[int]) -> Sequence[float]:
            planned = dict(plan.get(index, ()))
            if planned and max(planned) == anchors[-1] and set(planned) <= set(anchors):
                return [planned.get(anchor, 0.0) for anchor in anchors]
            return usual(index, anchors)

        return weigh

    def check(self, run: Run, parts: Sequence[Sequence[int]]) -> None:
        """Raises BadConfig if a run like this, in which denoisers are called at these steps, cannot have so many
        computed steps."""
        least = sum(fewest(len(own), self._longest, self.forced(run, own)) for own in parts)
        if not least <= self.computed_steps <= run.total:
            raise BadConfig(
                f"computed_steps = {self.computed_steps}: a run of {run.total} takes {least} to {run.total}"
            )

    def calibrated(self, calibrator: Calibrator) -> Passes:
        traces: list[Trace] = []
        inside = None if self.site == "output" else SiteTrace()

        def install(anatomy: Anatomy, clock: StepClock, recorder: Recorder) -> Session | None:
            traces.append(Trace(clock, calibrator.heard))
            clock.on_end.append(check)
            if inside is None:
                return None
            return Recording(self, anatomy, clock, recorder, inside.seen, [self.region(anatomy)])

        def check(run: Run) -> None:
            if traces[0].run is run:
                self.check(run, [*calibrator.parts(run).values()])

        yield install
        return self.planned(traces[0], calibrator, inside)

    def planned(self, trace: Trace, calibrator: Calibrator, inside: SiteTrace | None = None) -> DP:
        """This method with the plan of least predicted error, of what is cached `inside`, or else of the outputs.

        Denoisers that share a run share its computed steps; how many each has is chosen on the outputs. The dynamic
        program predicts from the last two computed steps; a higher order takes part in the weights of the plan. An
        error inside counts as much for the final latents as the output of its step would. Raises ValueError where no
        plan is possible.
        """
        run, gram = trace.run, trace.gram
        if run is None or gram is None:
            raise ValueError("no complete run was traced")
        if not np.isfinite(gram if inside is None else inside.gram).all():
            raise ValueError("the model's outputs are not finite numbers; try another dtype or guidance scale")
        parts = [*calibrator.parts(run).values()]
        self.check(run, parts)
        moves = influence(trace.solver, run)

        def costs_of(steps: Sequence[int], own: Floats) -> Costs:
            part = run.only(steps)
            return Costs(own, super(DP, self).weigher(part), moves[[*steps]], ridge=self.ridge, longest=self._longest)

        forced = [self.forced(run, own) for own in parts]
        outputs = [costs_of(own, gram[np.ix_(own, own)]) for own in parts]
        steps, costs, chosen = parts[0], outputs[0], shared_steps(outputs, self.computed_steps, forced)[0]
        if inside is not None:
            steps, costs = [*inside.steps], costs_of(inside.steps, inside.gram)
            chosen = optimal_steps(costs.table(), len(chosen), self.forced(run, steps))
        skipped = [(k, known) for known, end in spans(chosen, len(steps)) for k in range(known[-1] + 1, end)]
        weights = {steps[k]: tuple((steps[j], f) for j, f in costs.weights(k, known)) for k, known in skipped}
        return self.with_plan(self.schedule(Schedule, calibrator, steps, costs, chosen, weights=weights))

    @property
    def _longest(self) -> int:
        return min(self.longest, self.max_consecutive_cached or self.longest)
