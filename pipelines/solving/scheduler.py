"""A pipeline's scheduler on a plan: the plan's noise levels, and its weights on top of what the scheduler does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from fastdiff.listening import same

from .combine import At, onward
from .levels import Levels, put
from .lockstep import replaced
from .plan import SolverPlan

LATE = "the run begins inside the plan of the solver: its noise levels are taken with the stock solver's weights"


def on_plan(host: Any, own: Any, plan: SolverPlan, say: Callable[[str], None]) -> Any:
    """Turn the scheduler `host` into one that follows `plan`, whatever number of steps it is asked for; it is saved as
    `own`, the pipeline's. What it has seen is part of its state, which pipelines copy and put back."""
    base = type(host)

    @wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(base.set_timesteps).bind(self, *args, **kwargs).arguments
        mu, device = given.get("mu"), given.get("device")
        base.set_timesteps(self, plan.evaluations, device=device, **({} if mu is None else {"mu": mu}))
        if plan.places:
            put(self, plan.places, Levels.of(self, mu), device)
        self._fastdiff_seen, self._fastdiff_asked = (), given.get("num_inference_steps")

    @wraps(base.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, model_output, timestep, sample, *args, **kwargs)
        if not any(plan.weights):
            return result
        index, kept = self.step_index - 1, self._fastdiff_seen
        if len(kept) < min(index, plan.order - 1):
            say(LATE)
            return result
        seen = (*kept, At(sample, model_output, result[0]))[-plan.order :]
        self._fastdiff_seen = seen
        return replaced(result, onward(seen, plan.weights[index], plan.order)) if plan.weights[index] else result

    body = {
        "set_timesteps": set_timesteps, "step": step,
        "save_pretrained": lambda self, *a, **k: own.save_pretrained(*a, **k),
        "_fastdiff_seen": (), "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
    }  # fmt: skip
    host.__class__ = same(base)(base.__name__, (base,), body)
    return host
