"""Putting a pipeline's scheduler on a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from fastdiff.anatomy import Anatomy
from fastdiff.caller import running_pipeline
from fastdiff.clock import StepClock
from fastdiff.config import Config
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.listening import EARS, unheard
from fastdiff.patch import PatchSet
from fastdiff.pipelines.loading import embedded_name
from fastdiff.run import Run

from .plan import SolverPlan
from .scheduler import OnPlan
from .schedulers import host, ode, solver

EXCHANGED = "the pipeline's scheduler was exchanged after accelerate: the solver is off; accelerate the pipeline again"


def install(
    pipe: Any, config: Config, anatomy: Anatomy, clock: StepClock, note: Callable[[str], None], patches: PatchSet
) -> SolverPlan | None:
    """From now on every run of the pipeline goes by the config's plan of a solver, if it has one, which is returned.

    Raises UnsupportedModel for a pipeline without one scheduler, BadConfig for a scheduler that no weights can stand
    for or that another accelerated pipeline listens to, for a plan of another model or noise schedule, with parastep.
    """
    if config.solver is None:
        return None
    if config.parallel is not None and config.parallel.method == "parastep":
        raise BadConfig("parastep predicts along with the steps of a stock solver; leave out solver, or parastep")
    method: Any = config.solver
    plan: SolverPlan = method.found(embedded_name(pipe))
    own = vars(pipe).get("scheduler")
    if not hasattr(own, "step"):
        raise UnsupportedModel(f"{type(pipe).__name__} has no scheduler that a fitted solver could stand for")
    if hasattr(type(own), EARS):
        raise BadConfig(
            "this scheduler object belongs to another accelerated pipeline, too; give this pipeline one of its own"
        )
    if plan.leaves_out is not None and config.cache is not None:
        raise BadConfig(
            f"the solver's plan says what its evaluations leave out, so nothing is left for cache = "
            f"{config.cache.method!r}; leave out cache, or take a plan of whole evaluations"
        )
    stock = host(own)  # refuses what no solver can stand for, also where a stock one is to be used
    plan.check_model(anatomy, ode(own))
    made = stock if plan.use == "fitted" else unheard(own) if plan.use == "own" else solver(plan.use, own)
    on = OnPlan(own, made, plan, note, lambda: (running := running_pipeline()) is None or running is pipe)
    patches.call(on.become, on.restore)
    _count(pipe, on, patches)

    def compare(run: Run) -> None:
        if pipe.scheduler is not own:
            note(EXCHANGED)
            return
        if on.asked not in (None, plan.evaluations):
            note(f"the solver's plan of {plan.evaluations} evaluations takes the place of {on.asked} steps")
        if on.eta:
            note(f"eta = {on.eta:g} asks for noise at every step, which a fitted solver leaves out")
        for text in plan.differences(run, anatomy):
            note(text)

    clock.on_start.append(compare)
    return plan


def _count(pipe: Any, on: OnPlan, patches: PatchSet) -> None:
    """What a pipeline makes of a number of steps that the plan overrides, and of noise that no plan has: which part a
    strength leaves, how long the bar is."""
    own, plan = on.own, on.plan
    above = PatchSet()  # the clock's bar lies above, and is taken off first

    def put(name: str, wrapper: Callable[..., Any]) -> None:
        patches.call(lambda: above.set(pipe, name, wraps(getattr(pipe, name))(wrapper)), above.restore)

    timesteps = getattr(pipe, "get_timesteps", None)
    if timesteps is not None and [*inspect.signature(timesteps).parameters][:2] == ["num_inference_steps", "strength"]:

        def planned(num_inference_steps: int, strength: float, *args: Any, **kwargs: Any) -> Any:
            if pipe.scheduler is own:
                num_inference_steps = plan.evaluations
                strength = plan.left(strength) if strength < 1 else strength
            return timesteps(num_inference_steps, strength, *args, **kwargs)

        put("get_timesteps", planned)
    bar = getattr(pipe, "progress_bar", None)
    if bar is not None:

        def whole(iterable: Any = None, total: int | None = None) -> Any:
            least = total if total is None or pipe.scheduler is not own else min(total, plan.evaluations)
            return bar(iterable) if least is None else bar(iterable, total=least)

        put("progress_bar", whole)
    extra = getattr(pipe, "prepare_extra_step_kwargs", None)
    if extra is not None:

        def quiet(generator: Any, eta: Any = 0.0, *args: Any, **kwargs: Any) -> Any:
            on.eta = eta or 0.0
            return extra(generator, eta, *args, **kwargs)

        put("prepare_extra_step_kwargs", quiet)
