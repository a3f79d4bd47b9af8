"""Where a pipeline is in its denoising loop: which run, which step, how many, which branch.

Derived from the scheduler instance and the calls of the denoiser, never from the pipeline's code, so it holds for any
loop that calls `scheduler.set_timesteps`, the denoiser, and `scheduler.step`. A "step" is one evaluation of the model
per branch: Heun has 2n - 1 of them, PNDM n + 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import pairwise
from types import MethodType
from typing import Any, ClassVar

import torch

from .patch import PatchSet

WATCHED = "_fastdiff_watched"  # mark on the forward of a denoiser that a clock watches


@dataclass(frozen=True)
class Run:
    """One pass of the denoising loop.

    `timesteps` and `sigmas` hold one float per evaluation that will be made (img2img has fewer than the scheduler
    lists); sigma is noise over signal, or the flow-matching sigma in [0, 1] if `flow`. `scheduler` is its class name,
    `guidance_scale` what the pipeline says of itself, if anything, `shape` that of the denoiser's input without the
    batch, `late` whether the run leaves out the scheduler's first steps (img2img).
    """

    number: int
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    flow: bool
    scheduler: str = ""
    guidance_scale: float | None = None
    shape: tuple[int, ...] = ()
    late: bool = False
    _axes: dict[str, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def total(self) -> int:
        return len(self.timesteps)

    def only(self, steps: Sequence[int]) -> Run:
        """A run of some of the steps."""
        timesteps, sigmas = ([axis[i] for i in steps] for axis in (self.timesteps, self.sigmas))
        return replace(self, timesteps=tuple(timesteps), sigmas=tuple(sigmas), _axes={})

    def coordinates(self, kind: str) -> tuple[float, ...]:
        """Positions of the evaluations on one axis: step, timestep, sigma or logsnr; strictly monotone or steps."""
        if kind not in self._axes:
            self._axes[kind] = self._positions(kind)
        return self._axes[kind]

    def signal_and_noise(self, index: int) -> tuple[float, float]:
        """How much signal and how much noise the latents of a step hold, x = signal * x_0 + noise * epsilon."""
        sigma = self.sigmas[index]
        if self.flow:
            return 1 - sigma, sigma
        signal = 1 / math.sqrt(1 + sigma * sigma)
        return signal, sigma * signal

    def _positions(self, kind: str) -> tuple[float, ...]:
        steps = tuple(float(i) for i in range(self.total))
        if kind == "step":
            return steps
        if kind == "timestep":
            found = self.timesteps
        elif kind == "sigma":
            found = self.sigmas
        else:
            found = tuple(self._logsnr(s) for s in self.sigmas)
        falls = [a > b for a, b in pairwise(found)]
        monotone = (all(falls) or not any(falls)) and len(set(found)) == len(found)
        return found if monotone else steps  # Heun and PNDM visit a time twice

    def _logsnr(self, sigma: float) -> float:
        sigma = min(max(sigma, 1e-4), 1 - 1e-4 if self.flow else 1e4)
        return 2 * math.log((1 - sigma) / sigma if self.flow else 1 / sigma)


@dataclass(frozen=True)
class Step:
    """One call of the denoiser. `branch` counts the calls since the last `scheduler.step` (0 is cond or the batch)."""

    run: Run
    index: int
    branch: int


@dataclass
class StepClock:
    """Attached to a pipeline's scheduler, it watches the denoisers; rooms read `now` inside a denoiser call.

    `on_start` and `on_end` are told of each run (`on_end` also of one cut short), `on_call` and `on_return` of each
    denoiser call inside a run, `on_output` of what the solver was given at a step, `on_tick` of each finished step.
    `before_step` may replace the latents that the solver is given at a step; `solve`, if set, is called in the place of
    the solver's step, with it and its arguments. `solved` is what it gave last.
    """

    pipe: Any
    on_start: list[Callable[[Run], None]] = field(default_factory=list)
    on_end: list[Callable[[Run], None]] = field(default_factory=list)
    on_tick: list[Callable[[int], None]] = field(default_factory=list)
    on_call: list[Callable[[Step], None]] = field(default_factory=list)
    on_return: list[Callable[[Step], None]] = field(default_factory=list)
    on_output: list[Callable[[int, Any], None]] = field(default_factory=list)
    before_step: list[Callable[[int, Any], Any]] = field(default_factory=list)
    solve: Callable[[Callable[..., Any], tuple, dict], Any] | None = None
    solved: Any = None

    open_ended: ClassVar[bool] = False  # whether a run has no list of steps: it takes as many as it needs

    def __post_init__(self) -> None:
        self.run: Run | None = None
        self.now: Step | None = None
        self.index = 0
        self._number = 0
        self._calls: dict[str, int] = {}
        self._pending = False
        self._first_timestep: Any = None
        self._patches = PatchSet()
        self._scheduler: Any = None

    def attach(self) -> None:
        """Listen to the pipeline's scheduler and progress bar; `detach` puts them back."""
        self._scheduler = self.pipe.scheduler
        self._listen("set_timesteps", lambda *_, **__: self._expect_run())
        self._listen(
            "step",
            lambda output=None, *_, model_output=None, **__: self._tick(output, model_output),
            self._with_sample,
        )
        if hasattr(self._scheduler, "scale_model_input"):
            self._listen("scale_model_input", self._scaled)
        if hasattr(self.pipe, "progress_bar"):
            progress_bar = self.pipe.progress_bar

            @wraps(progress_bar)
            def watched_bar(*args: Any, **kwargs: Any) -> Any:
                bar = progress_bar(*args, **kwargs)
                return _Bar(bar, self._leave) if hasattr(bar, "__exit__") else bar

            self._patches.set(self.pipe, "progress_bar", watched_bar)

    def _listen(
        self, name: str, heard: Callable[..., None], change: Callable[[tuple, dict], tuple[tuple, dict]] | None = None
    ) -> None:
        """Call `heard` after the scheduler's method `name`, whose arguments `change` may replace. It keeps its
        signature, which pipelines read to see whether sigmas, eta or a generator are taken, and is a bound method, so
        that a deep copy of the scheduler goes its own way."""
        scheduler, method = self._scheduler, getattr(self._scheduler, name)

        @wraps(getattr(type(scheduler), name))
        def listened(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not scheduler:
                return getattr(type(this), name)(this, *args, **kwargs)
            if change is not None:
                args, kwargs = change(args, kwargs)
            solve = self.solve if name == "step" and self.run is not None else None
            result = method(*args, **kwargs) if solve is None else solve(method, args, kwargs)
            if name == "step":
                self.solved = result
            heard(*args, **kwargs)
            return result

        self._patches.set(scheduler, name, MethodType(listened, scheduler))

    def _with_sample(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of scheduler.step with the latents of `before_step`, which it calls `sample`."""
        if self.run is None or not self.before_step:
            return args, kwargs
        order = list(inspect.signature(type(self._scheduler).step).parameters)[1:]
        place = order.index("sample") if "sample" in order else 2  # CogVideoX's DPM solver takes more before it
        for change in self.before_step:
            if "sample" in kwargs:
                kwargs = {**kwargs, "sample": change(self.index, kwargs["sample"])}
            elif len(args) > place:
                args = (*args[:place], change(self.index, args[place]), *args[place + 1 :])
        return args, kwargs

    @property
    def upcoming(self) -> int | None:
        """The step whose denoiser calls come next, for what runs before them; None before a run's first call."""
        return self.index if self.run is not None and not self._pending else None

    @property
    def number(self) -> int:
        """The number of the run in progress, or of the one to come."""
        return self._number + (self.run is None or self._pending)

    def check(self) -> None:
        """Raises NotReversible if `detach` would."""
        self._patches.check()

    def detach(self) -> None:
        self._patches.restore()
        self.abandon()

    def watch(self, denoiser: torch.nn.Module, name: str, patches: PatchSet) -> None:
        """Wrap the denoiser's forward; install last, so that every other patch runs inside the step it belongs to."""

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def watched(*args: Any, **kwargs: Any) -> Any:
                timestep = kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None
                try:
                    step = self.now = self._call(name, timestep, args, kwargs)
                    if step is None:
                        return forward(*args, **kwargs)
                    for callback in self.on_call:
                        callback(step)
                    result = forward(*args, **kwargs)
                    for callback in self.on_return:
                        callback(step)
                except BaseException:
                    self.abandon()  # whatever was remembered of this run must not reach the next one
                    raise
                finally:
                    self.now = None
                return result

            vars(watched)[WATCHED] = True
            return watched

        patches.wrap_forward(denoiser, wrapper)

    def _call(self, denoiser: str, timestep: Any, args: tuple, kwargs: dict) -> Step | None:
        """The step that a call belongs to; no device synchronisation after the first call of a run."""
        if self.pipe.scheduler is not self._scheduler:  # swapped after accelerate: listen to the new one
            self._patches.restore()
            self.attach()
            if getattr(self._scheduler, "num_inference_steps", None) is not None:
                self._expect_run()
        if self._pending:
            self._begin(timestep, _shape(args, kwargs))
        if self.run is None:
            return None
        branch = self._calls.get(denoiser, 0)
        self._calls[denoiser] = branch + 1
        return Step(self.run, self.index, branch)

    def abandon(self) -> None:
        """Forget the run in progress, after an exception."""
        run, self.run, self._pending = self.run, None, False
        if run is not None:
            for callback in self.on_end:
                callback(run)

    def _leave(self) -> None:
        """The loop is left: at its end, by an interrupt, or by an exception outside the denoiser."""
        if self.run is not None:
            self.abandon()

    def _scaled(self, sample: Any = None, timestep: Any = None, *_: Any, **__: Any) -> None:
        if self._pending and self._first_timestep is None:
            self._first_timestep = timestep

    def _expect_run(self) -> None:
        self.abandon()
        self._pending, self._first_timestep = True, None

    def _begin(self, timestep: Any, shape: tuple[int, ...]) -> None:
        scheduler = self._scheduler
        self._pending = False
        grid = [] if self.open_ended else torch.as_tensor(scheduler.timesteps).flatten().tolist()
        listed = [float(t) for t in grid]
        if not listed and not self.open_ended:
            return
        offset = self._offset(listed, timestep)
        sigmas, flow = _sigmas(scheduler, listed)
        self._number += 1
        guidance = getattr(self.pipe, "guidance_scale", None)
        self.run = Run(
            self._number, tuple(listed[offset:]), tuple(sigmas[offset:]), flow, type(scheduler).__name__,
            float(guidance) if isinstance(guidance, int | float) else None, shape, offset > 0,
        )  # fmt: skip
        self.index, self._calls = 0, {}
        for callback in self.on_start:
            callback(self.run)

    def _offset(self, listed: list[float], timestep: Any) -> int:
        """Index of the first timestep that is used; img2img starts late in the scheduler's list."""
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is not None:
            return min(int(begin), len(listed) - 1)
        first = self._first_timestep if self._first_timestep is not None else timestep
        if first is None:
            return 0
        value = float(torch.as_tensor(first).flatten()[0])
        return listed.index(value) if value in listed else 0

    def _tick(self, output: Any, named_output: Any) -> None:
        if self.run is None:
            return
        for listener in self.on_output:
            listener(self.index, named_output if output is None else output)
        for callback in self.on_tick:
            callback(self.index)
        self.index += 1
        self._calls = {}
        if self.index >= self.run.total and not self.open_ended:
            self.abandon()


class _Bar:
    """A progress bar that tells when its loop is left, however that happens."""

    def __init__(self, bar: Any, left: Callable[[], None]) -> None:
        self._bar, self._left = bar, left

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._left()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._left()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _shape(args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Shape of the denoiser's input, without the batch."""
    tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim > 1)
    return tuple(next(tensors, torch.empty(0)).shape[1:])


def _sigmas(scheduler: Any, timesteps: list[float]) -> tuple[list[float], bool]:
    """Noise level at each timestep, and whether it is a flow-matching sigma."""
    flow = hasattr(scheduler, "scale_noise") or getattr(scheduler.config, "use_flow_sigmas", False) is True
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        found = [float(s) for s in torch.as_tensor(sigmas).flatten().tolist()[: len(timesteps)]]
        if hasattr(scheduler, "sigmas_interpol"):  # KDPM2: every other evaluation lies between two of its sigmas
            between = scheduler.sigmas_interpol.tolist()
            found[1::2] = between[1 : len(found) : 2]
        return found, flow
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return timesteps, flow
    known = alphas.tolist()
    kept = [max(known[min(max(int(t), 0), len(known) - 1)], 1e-12) for t in timesteps]
    return [math.sqrt((1 - a) / a) for a in kept], flow
