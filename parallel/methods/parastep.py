"""ParaStep: Communication-Efficient Diffusion Denoising Parallelization. Paper: https://arxiv.org/abs/2505.14741."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, parameters
from fastdiff.clock import Run, StepClock
from fastdiff.errors import PeerLost
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.recompute import Call, recompute
from fastdiff.parallel.split import Forward
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder


class ParaStep(ParallelMethod):
    """Each rank computes another step of a cycle, on latents that the last known output predicts.

    At the end of a cycle all ranks show what they computed and repeat the solver's steps with it, so that multistep
    solvers remember the true outputs (the authors broadcast the latents alone). In between a pipeline's callbacks see
    predicted latents. `order` = 2 predicts by the line through the last two outputs instead of reusing the last.

    Formula: in a cycle of p steps from step i on, rank k computes e_(i+k) = f(x'_(i+k)), where the solver made x' of
    x_i with e' = e_(i-1); with order 2, e' = e_a + (t - t_a) (e_a - e_b) / (t_a - t_b) for the last known steps b, a.
    """

    method: Literal["parastep"] = "parastep"
    warmup_steps: int = Field(5, ge=1, description="steps at the start that every rank computes")
    order: Literal[1, 2] = Field(1, description="known outputs that a prediction uses")

    own_axis: ClassVar[str] = "step"


class Cycle:
    """The step axis of one pipeline: a place in the solver's step, and one in each denoiser's forward."""

    def __init__(self, method: ParallelMethod, bus: Bus, clock: StepClock, recorder: Recorder) -> None:
        self.sure = method.on_peer_loss == "local"
        self.warmup, self.order = max(1, method.warmup_steps), getattr(method, "order", 1)
        self.bus, self.clock, self.recorder = bus, clock, recorder
        self.place, self.length = bus.topology.place("step"), bus.topology.step
        self._forget(None)
        clock.on_start.append(self._forget)
        clock.on_end.append(self._forget)
        clock.solve = self._solve

    def _forget(self, run: Run | None) -> None:
        """Nothing of a run reaches the next one, or stays in memory after it."""
        self.known: list[tuple[float, Tensor]] = []  # time and output (guidance applied) of the newest true steps
        # each step of the cycle: the solver's call, its output, and calls of the denoiser
        self._passed: list[tuple[inspect.BoundArguments, Tensor, list[Call]]] = []
        self._calls: list[Call] = []  # of the denoiser in this step
        self._mine = torch.empty(0)  # what this rank computed in the cycle
        self._before: dict[str, Any] = {}
        self._last: dict[tuple[str, int], tuple[list[torch.Size], Any]] = {}  # by denoiser and branch: a call, output

    def attach(self, anatomy: Anatomy, patches: PatchSet) -> None:
        latents = parameters(anatomy.denoiser)[0]

        def wrapper(forward: Forward) -> Forward:
            @wraps(forward)
            def computed(*args: Any, **kwargs: Any) -> Any:
                step = self.clock.now
                if step is None:
                    return forward(*args, **kwargs)
                leaves, place = pytree.tree_leaves((args, kwargs)), (anatomy.component, step.branch)
                asked = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
                known, last = self._last.get(place, (None, None))
                if self.bus.alone or self._turn(step.index) or known != asked:
                    output = forward(*args, **kwargs)
                    self._last[place] = asked, output
                else:
                    self.recorder.elsewhere()
                    output = pytree.tree_map_only(Tensor, torch.clone, last)  # the solver's own is replaced
                first = {latents: kwargs[latents]} if latents in kwargs else {}  # where `recompute` looks for them
                self._calls.append((forward, args, first | kwargs, output))
                return output

            return computed

        patches.wrap_forward(anatomy.denoiser, wrapper)

    def own(self, run: Run) -> list[int]:
        """The steps that this rank computes."""
        return [index for index in range(run.total) if self._turn(index)]

    def _turn(self, index: int) -> bool:
        return index < self.warmup or self.clock.repeats or (index - self.warmup) % self.length == self.place

    def _solve(self, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        run, index = self.clock.run, self.clock.index
        assert run is not None
        call = inspect.signature(method).bind(*args, **kwargs)
        output = call.arguments["model_output"]
        calls, self._calls = self._calls, []
        if index < self.warmup or self.clock.repeats or (self.bus.alone and not self._passed):
            self._learn(run, index, output)
            return method(*args, **kwargs)
        place = (index - self.warmup) % self.length
        if place == 0:
            self._passed, self._before = [], self._state()
        self._passed.append((call, output, calls))
        if place == self.place:
            self._mine = output
        ends = place == self.length - 1 or index == run.total - 1
        if not ends and not self.bus.alone:  # in the middle of a cycle a layer may have lost a rank
            return _again(method, call, model_output=self._mine if place == self.place else self._predicted(run, index))
        return self._replay(method, run, index - place, output)

    def _replay(self, method: Callable[..., Any], run: Run, begin: int, like: Tensor) -> Any:
        """The cycle's steps again, with the outputs of all ranks; without them, with what this rank alone computes."""
        count = len(self._passed)
        own = self._mine if self.place < count else torch.zeros_like(like)
        told: list[Tensor] | None = None
        try:
            if not self.bus.alone:
                shown = self.bus.gather("step", "the outputs of a cycle", own, "step", [like.shape] * self.length)
                if self.sure:
                    self.bus.arrived()
                told = shown
        except PeerLost as error:
            self.bus.lost(error)
        vars(self.clock.scheduler).update(self._before)
        result: Any = None
        passed, self._passed = self._passed, []
        for k, (call, output, calls) in enumerate(passed):
            given = latents = call.arguments["sample"]
            if result is not None:
                latents = result[0] if isinstance(result, tuple) else result.prev_sample
            if told is not None:
                output = told[k]
            elif k or self.place:  # the first step's latents were no guess
                again = recompute(calls, given, output, latents)
                if again is None:
                    self.recorder.note(f"step {begin + k}, which was lost with a rank, stayed a guess")
                    again = own if k == self.place else self._predicted(run, begin + k)
                output = again
            result = _again(method, call, model_output=output, sample=latents)
            self._learn(run, begin + k, output)
        return result

    def _state(self) -> dict[str, Any]:
        """What the solver remembers."""
        return {name: copy.copy(value) for name, value in vars(self.clock.scheduler).items()}

    def _learn(self, run: Run, index: int, output: Tensor) -> None:
        self.known = [*self.known[-1:], (run.coordinates("timestep")[index], output)]

    def _predicted(self, run: Run, index: int) -> Tensor:
        """The output of a step that another rank computes: the last known one, or on a line with the one before."""
        (time, value), at = self.known[-1], run.coordinates("timestep")[index]
        if self.order == 1 or len(self.known) < 2:
            return value
        before, older = self.known[0]
        return value + (at - time) / (time - before) * (value - older)


def _again(method: Callable[..., Any], call: inspect.BoundArguments, **other: Tensor) -> Any:
    """A solver's call with other tensors in the places of some."""
    call.arguments.update(other)
    return method(*call.args, **call.kwargs)
