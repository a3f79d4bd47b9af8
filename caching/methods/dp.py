"""Ours: the optimal steps for a predictor, found by dynamic programming on a trace. Related: https://arxiv.org/abs/2602.22654."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Weigh
from fastdiff.caching.calibration import Recording
from fastdiff.caching.measured import Edges, Finals, group_errors
from fastdiff.caching.objectives import MeanVelocity, least_worst
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
    before i, c_i how much the solver makes of an error at step i in the final latents (its impulse response). With
    `minimax` the largest of these, over groups and traced images, takes the place of the sum of their means; with
    `meancache` the sum of exp(4 e / m) - 1, e the root of a group's over sum_i |c_i| from its computed step on; with
    `lemica` the worst, then the second worst and so on, of mean |x - x'| over the finished latents, where a run of its
    own leaves out the group.
    """

    method: Literal["dp"] = "dp"
    predictor: str = "adams_bashforth"
    coordinate: Axis = Field("logsnr", description="axis on which predictions extrapolate")
    computed_steps: int = Field(20, ge=1, description="steps to compute; what calibrate plans for")
    site: Site = Field("output", description="what a skipped step leaves out and predicts")
    live_blocks: int = Field(1, ge=0, description="blocks that always run (site stack)")
    objective: Literal["sum", "minimax", "meancache", "lemica"] = Field(
        "sum",
        description="what calibrate makes least: the sum of groups' errors, the worst group of the worst image, errors "
        "of the mean velocity with peaks suppressed, or the worst group, with a run for each group",
    )
    longest: int = Field(8, ge=1, description="longest run of skipped steps calibrate may plan")
    ridge: float | None = Field(
        None, ge=0, description="fit weights to the trace, pulled this much to the predictor's; None: the predictor's"
    )
    fit_damping: bool = Field(
        False, description="take of each forecast change the share that is best for the trace, in closed form"
    )
    plan: Annotated[Schedule | Each[Schedule] | None, from_file(Schedule)] = Field(None, description=PLAN)

    @model_validator(mode="after")
    def _measures_what_it_does(self) -> DP:
        if self.objective == "lemica" and (self.fit_damping or self.ridge is not None):
            raise ValueError(
                'objective = "lemica" measures weights of the predictor, and fit_damping or ridge takes others; leave '
                'them out, or set objective = "sum"'
            )
        return self

    @model_validator(mode="after")
    def _damps_something(self) -> DP:
        if self.fit_damping and self.predictor == "reuse":
            raise ValueError(
                "fit_damping = true: reuse forecasts no change to take a share of; set predictor to adams_bashforth or "
                "spectrum, or fit_damping = false"
            )
        return self

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
        finals: list[Finals] = []
        seen = SiteTrace()

        def install(anatomy: Anatomy, clock: StepClock, recorder: Recorder) -> Session:
            traces.append(Trace(clock, calibrator.heard))
            if self.objective == "lemica":
                finals.append(Finals(clock, calibrator.heard))
            clock.on_end.append(check)
            return Recording(self, anatomy, clock, recorder, seen.seen, [self.region(anatomy)])

        def check(run: Run) -> None:
            if traces[0].run is run:
                self.check(run, [*calibrator.parts(run).values()])

        yield install
        edges: Edges = {}
        if self.objective == "lemica":
            edges = yield from group_errors(self, calibrator, finals[0].found, self._longest)
            yield install  # the calibrator knows of its last pass: one that calls the denoiser in all steps
        return self.planned(traces[-1], calibrator, seen, edges)

    def planned(self, trace: Trace, calibrator: Calibrator, seen: SiteTrace, edges: Edges | None = None) -> DP:
        """This method with the plan of least predicted error, of the outputs, or of what was `seen` of another site.

        Denoisers that share a run share its computed steps; how many each has is chosen on the outputs. The dynamic
        program predicts from the last two computed steps; a higher order takes part in the weights of the plan. An
        error inside counts as much for the final latents as the output of its step would. edges: measured costs of
        groups, which decide if there are any. Raises ValueError where no plan is possible.
        """
        run, gram, inside = trace.run, trace.gram, self.site != "output"
        if run is None or gram is None:
            raise ValueError("no complete run was traced")
        if not np.isfinite(seen.gram if inside else gram).all():
            raise ValueError("the model's outputs are not finite numbers; try another dtype or guidance scale")
        parts = [*calibrator.parts(run).values()]
        self.check(run, parts)
        moves, minimax = influence(trace.solver, run), self.objective == "minimax"

        def costs_of(steps: Sequence[int], own: Floats, runs: Floats | None) -> Costs:
            return (MeanVelocity if self.objective == "meancache" else Costs)(
                own, super(DP, self).weigher(run.only(steps)), moves[[*steps]], ridge=self.ridge,
                damp=self.fit_damping, longest=self._longest, runs=runs if minimax else None,
            )  # fmt: skip

        forced = [self.forced(run, own) for own in parts]
        outputs = [costs_of(own, gram[np.ix_(own, own)], trace.runs[:, own][:, :, own]) for own in parts]
        steps, costs = parts[0], outputs[0]
        chosen = shared_steps(outputs, self.computed_steps, forced, minimax=minimax)[0]
        if inside:
            steps, costs = [*seen.steps], costs_of(seen.steps, seen.gram, seen.runs)
            chosen = optimal_steps(costs.table(), len(chosen), self.forced(run, steps), minimax=minimax)
        if edges:
            chosen = least_worst(edges, run.total, self.computed_steps, self.forced(run, steps))
        skipped = [(k, known) for known, end in spans(chosen, len(steps)) for k in range(known[-1] + 1, end)]
        weights = {steps[k]: tuple((steps[j], f) for j, f in costs.weights(k, known)) for k, known in skipped}
        return self.with_plan(self.schedule(Schedule, calibrator, steps, costs, chosen, seen, weights=weights))

    @property
    def _longest(self) -> int:
        return min(self.longest, self.max_consecutive_cached or self.longest)
