"""Ours: a solver fitted to a model, noise levels and multistep weights at once. Related: S4S, https://arxiv.org/abs/2502.17423,
and PAS, https://arxiv.org/abs/2411.06503, which descend gradients; here each step is solved in closed form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastdiff.errors import BadConfig
from fastdiff.method import Method

from .plan import FROM_FILE, SolverPlan, shipped

BUDGET = (
    "the time of so many whole evaluations, which calibrate may spend on more of them: some of the conditional half "
    "alone, some with the inside predicted; None: all are whole, as many as evaluations says"
)
DEPTH = "share of a UNet's skips, or of the blocks, that stay live where calibrate has the inside predicted"


class Fitted(Method):
    """Evaluate the model at the noise levels of a calibrated plan and go on with its weights, whatever number of steps
    a call asks for.

    The weights are what is added to the step of the pipeline's scheduler (of a flow Euler's, else DPM-Solver++(2M)'s),
    so that none of them is that very scheduler. A run that begins inside the plan (image to image) takes its levels
    with the scheduler's own steps, and says so.

    Formula: x_{n+1} = step(x_n, f_n) + sum_k a_nk f_{n-k} + sum_k b_nk x_{n-k}; a and b minimise the mean log
    distance to the teacher's x_{n+1} on the student's own trajectories, the levels first the sum of what two outputs
    and two latents leave of it on the teacher's, then, moved one by one, the distance at the end.
    """

    method: Literal["fitted"] = "fitted"
    evaluations: int = Field(10, ge=1, le=1_000, description="calls of the model a picture; what calibrate plans for")
    order: int = Field(4, ge=1, le=8, description="model outputs that calibrate makes a step of")
    moves: int = Field(2, ge=0, le=8, description="passes in which calibrate moves the levels, nearer each time")
    polish: int = Field(1, ge=0, le=8, description="times that calibrate then moves all weights at once")
    budget: float | None = Field(None, ge=2, le=1_000, description=BUDGET)
    depth: float = Field(0.6, ge=0, le=1, description=DEPTH)
    plan: Annotated[SolverPlan | None, FROM_FILE] = Field(
        None, description="what calibrate found, or the path of its file; None: the one that comes with the model"
    )

    @model_validator(mode="after")
    def _one_number(self) -> Fitted:
        plan = self.plan
        if plan is None or self.evaluations == plan.evaluations:
            return self
        if "evaluations" in self.model_fields_set:
            raise ValueError(
                f"solver.evaluations = {self.evaluations}, but the plan is of {plan.evaluations}; calibrate one for it"
            )
        vars(self)["evaluations"] = plan.evaluations
        return self

    def found(self, model: str | None) -> SolverPlan:
        """The plan, or the one that comes with an embedded model. Raises BadConfig where there is none."""
        if self.plan is not None:
            return self.plan
        known = shipped(model)
        if self.evaluations not in known:
            has = f"{model} comes with plans of {', '.join(map(str, sorted(known)))}; " if known else ""
            raise BadConfig(
                f"the solver fitted with {self.evaluations} evaluations needs a plan: {has}make one with fastdiff "
                f"calibrate --set solver.evaluations={self.evaluations} -o PLAN.json, and name it as solver.plan"
            )
        return Fitted(plan=str(known[self.evaluations])).plan  # type: ignore[return-value]
