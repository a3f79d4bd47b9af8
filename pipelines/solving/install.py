"""Putting a plan's scheduler in the place of a pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fastdiff.anatomy import Anatomy
from fastdiff.clock import StepClock
from fastdiff.config import Config
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.listening import unheard
from fastdiff.patch import PatchSet
from fastdiff.pipelines.loading import embedded_name
from fastdiff.run import Run

from .plan import SolverPlan
from .scheduler import on_plan
from .schedulers import host, solver


def install(
    pipe: Any, config: Config, anatomy: Anatomy, clock: StepClock, note: Callable[[str], None], patches: PatchSet
) -> None:
    """From now on every run of the pipeline goes by the config's plan of a solver. Raises UnsupportedModel for a
    pipeline without one scheduler, BadConfig for a scheduler that no weights can stand for, for a plan of another
    model, and with parastep."""
    if config.parallel is not None and config.parallel.method == "parastep":
        raise BadConfig("parastep predicts along with the steps of a stock solver; leave out solver, or parastep")
    method: Any = config.solver
    plan: SolverPlan = method.found(embedded_name(pipe))
    own = vars(pipe).get("scheduler")
    if not hasattr(own, "step"):
        raise UnsupportedModel(f"{type(pipe).__name__} has no scheduler that a fitted solver could stand for")
    plan.check_model(anatomy)
    made = host(own) if plan.use == "fitted" else unheard(own) if plan.use == "own" else solver(plan.use, own)
    patches.set(pipe, "scheduler", on_plan(made, own, plan, note))
    _count(pipe, plan.evaluations, patches)

    def compare(run: Run) -> None:
        asked = getattr(pipe.scheduler, "_fastdiff_asked", None)
        if asked not in (None, plan.evaluations):
            note(f"the solver's plan of {plan.evaluations} evaluations takes the place of {asked} steps")
        for text in plan.differences(run, anatomy):
            note(text)

    clock.on_start.append(compare)


def _count(pipe: Any, evaluations: int, patches: PatchSet) -> None:
    """What a pipeline makes of a number of steps that the plan overrides: which part of them a strength leaves, and
    how long its bar is."""
    if hasattr(pipe, "get_timesteps"):
        timesteps = pipe.get_timesteps

        @wraps(timesteps)
        def planned(num_inference_steps: int, *args: Any, **kwargs: Any) -> Any:
            return timesteps(evaluations, *args, **kwargs)

        patches.set(pipe, "get_timesteps", planned)
    if hasattr(pipe, "progress_bar"):
        bar = pipe.progress_bar

        @wraps(bar)
        def whole(iterable: Any = None, total: int | None = None) -> Any:
            return bar(iterable) if total is None else bar(iterable, total=min(total, evaluations))

        own = PatchSet()  # the clock's bar lies above it, and is taken off first
        patches.call(lambda: own.set(pipe, "progress_bar", whole), own.restore)
