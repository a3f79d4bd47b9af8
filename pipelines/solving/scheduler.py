"""A pipeline's scheduler on a plan: the plan's noise levels, and its weights on top of what the scheduler does."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from fastdiff.listening import become, blank, deeply_copied, same

from .combine import At, onward
from .levels import put
from .lockstep import replaced
from .plan import SolverPlan

LATE = "the run begins inside the plan of the solver: its noise levels are taken with the stock solver's weights"
SHARED = (
    "this pipeline shares its scheduler with an accelerated one, whose solver made it {}; restore() that handle, or "
    "give this pipeline a scheduler of its own"
)


class OnPlan:
    """Makes a scheduler object the `host`, on a plan, in its place; `restore` makes it what it was.

    The object stays the same, so that pipelines that share it, or are made from this one, have their own scheduler
    again afterwards. Until then runs of pipelines that are not `ours` are the host's own.
    """

    def __init__(self, own: Any, host: Any, plan: SolverPlan, say: Callable[[str], None], ours: Callable[[], bool]):
        self.own, self.plan, self.say, self.ours = own, plan, say, ours
        self.kind, self.state, self.on = type(own), dict(vars(own)), False
        self.asked: int | None = None  # steps that the last run of ours was to have
        self.eta = 0.0  # noise that the pipeline was asked for
        self._host = host

    def become(self) -> None:
        self.on = True
        become(self.own, self._class(type(self._host)))
        vars(self.own).clear()
        vars(self.own).update(vars(self._host))

    def restore(self) -> None:
        """The inverse of `become`; copies that were made meanwhile are plain hosts from now on."""
        if self.on:
            self.on = False
            become(self.own, self.kind)
            vars(self.own).clear()
            vars(self.own).update(self.state)

    def _class(self, base: type) -> type:
        plain = self._plain
        body = {
            "set_timesteps": self._set_timesteps(base), "step": self._step(base), "_fastdiff_seen": None,
            "save_pretrained": lambda _, *args, **kwargs: plain().save_pretrained(*args, **kwargs),
            "__deepcopy__": deeply_copied, "__reduce_ex__": lambda *_: (blank, (self.kind,), self.state),
            "__module__": self.kind.__module__, "__qualname__": self.kind.__qualname__, "__doc__": base.__doc__,
        }  # fmt: skip
        return same(base)(self.kind.__name__, (base,), body)

    def _plain(self) -> Any:
        made = blank(self.kind)
        vars(made).update(copy.deepcopy(self.state))
        return made

    def _set_timesteps(self, base: Any) -> Callable[..., None]:
        plan = self.plan

        @wraps(base.set_timesteps)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            scheduler._fastdiff_seen = None
            if not self.on or not self.ours():
                if self.on:
                    warnings.warn(SHARED.format(base.__name__), stacklevel=2)
                base.set_timesteps(scheduler, *args, **kwargs)
                return
            given = inspect.signature(base.set_timesteps).bind(scheduler, *args, **kwargs).arguments
            listed = next((given[name] for name in ("sigmas", "timesteps") if given.get(name) is not None), None)
            self.asked = given.get("num_inference_steps") or (len(listed) if listed is not None else None)
            kept = {name: given[name] for name in ("device", "mu") if given.get(name) is not None}
            if plan.places or given.get("sigmas") is None:
                base.set_timesteps(scheduler, plan.evaluations, **kept)
            else:  # as pipelines of flows give them
                even = np.linspace(1.0, 1 / plan.evaluations, plan.evaluations)
                base.set_timesteps(scheduler, sigmas=even, **kept)
            if plan.places:
                put(scheduler, plan.places, given.get("mu"), given.get("device"))
            scheduler._fastdiff_seen = ()

        return set_timesteps

    def _step(self, base: Any) -> Callable[..., Any]:
        plan = self.plan

        @wraps(base.step)
        def step(scheduler: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            result = base.step(scheduler, model_output, timestep, sample, *args, **kwargs)
            seen = scheduler._fastdiff_seen
            if seen is None or not self.on or not any(plan.weights):
                return result
            index = scheduler.step_index - 1
            if index and not seen:
                self.say(LATE)
                scheduler._fastdiff_seen = None
                return result
            seen = (*seen, At(sample, model_output, result[0]))[-plan.order :]
            scheduler._fastdiff_seen = seen
            weights = plan.weights[index]
            return replaced(result, onward(seen, weights, plan.order)) if weights else result

        return step
