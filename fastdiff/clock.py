"""Where a pipeline is in its denoising loop: which run, which step, how many, which branch.

Derived from the scheduler instance and the calls of the denoiser, never from the pipeline's code, so it holds for any
loop that calls `scheduler.set_timesteps`, the denoiser, and `scheduler.step`. A "step" is one evaluation of the model
per branch: Heun has 2n - 1 of them, PNDM n + 1.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar

import torch

from .branches import Branches
from .caller import loop_length, running_pipeline, uses
from .listening import listen, unlisten
from .patch import PatchSet
from .places import place, span
from .progress import WatchedBar
from .report import UNTOLD
from .run import Run as Run
from .run import Step as Step
from .run import noise_levels

_TIMES = ("timestep", "timestep_ratio", "t")  # what denoisers call it
WATCHED = "_fastdiff_watched"  # mark on the forward of a denoiser that a clock watches
_COPIES = (
    "the steps are taken by copies of the scheduler, each with a time of its own: nothing was cached, all is computed"
)
_FOREIGN = "calls of a shared denoiser by another pipeline or thread were computed, and remembered nowhere"
_ALIKE = (
    "calls of one step that nothing tells apart (the same text, settings and cache_context) were computed; "
    "denoiser.cache_context(name) tells them apart"
)


@dataclass
class StepClock:
    """Attached to a pipeline's schedulers, it watches the denoisers; rooms read `now` inside a denoiser call.

    `on_expect` is told that timesteps were set, `on_start` and `on_end` of each run (`on_end` also of one cut short),
    `on_call` and `on_return` of each denoiser call inside a run, `on_output` of what the solver was given at a step,
    `on_tick` of each finished step, `on_note` of what a user should know. `before_step` may replace the latents that
    the solver is given at a step; `solve`, if set, is called in the place of the solver's step, with it and its
    arguments. `solved` is what it gave last.

    `now` is None, and the call has to be computed and forgotten, outside of a run, in calls of another pipeline or
    thread, and where nothing tells the branch of a call.
    """

    pipe: Any
    on_expect: list[Callable[[], None]] = field(default_factory=list)
    on_start: list[Callable[[Run], None]] = field(default_factory=list)
    on_end: list[Callable[[Run], None]] = field(default_factory=list)
    on_tick: list[Callable[[int], None]] = field(default_factory=list)
    on_call: list[Callable[[Step], None]] = field(default_factory=list)
    on_return: list[Callable[[Step], None]] = field(default_factory=list)
    on_output: list[Callable[[int, Any], None]] = field(default_factory=list)
    on_note: list[Callable[[str], None]] = field(default_factory=list)
    before_step: list[Callable[[int, Any], Any]] = field(default_factory=list)
    solve: Callable[[Callable[..., Any], tuple, dict], Any] | None = None
    solved: Any = None
    said: Callable[[], str] = str  # of the run so far, for the progress bar

    open_ended: ClassVar[bool] = False  # whether a run has no list of steps: it takes as many as it needs

    def __post_init__(self) -> None:
        self.run: Run | None = None
        self.now: Step | None = None
        self.index = 0
        self.repeats = False  # whether the loop calls `scheduler.step` more than once a step
        self.scheduler: Any = None  # whose run it is, or was last
        self._number = 0
        self._pending = False
        self._thread: int | None = None
        self._first_timestep: Any = None
        self._listed: int | None = None  # how many timesteps the progress bar was given, if it was
        self._context: str | None = None
        self._branches: dict[str, Branches] = {}
        self._called = self._fresh = self._copied = self._hearing = self._viewed = False
        self._lists: list[Any] = []  # the scheduler's timesteps when they were set, and when the run began
        self._takes: list[str] = []  # names of what the scheduler's step is given
        self._ticked: Any = None  # place in the scheduler's list of the step that was taken last
        self._patches = PatchSet()
        self._schedulers: list[Any] = []
        self._lock = threading.RLock()  # two threads in one denoiser would read each other's `now`

    def attach(self) -> None:
        """Listen to the pipeline's schedulers and progress bar; `detach` puts them back."""
        self._hear()
        if hasattr(self.pipe, "progress_bar"):
            progress_bar = self.pipe.progress_bar

            @wraps(progress_bar)
            def watched_bar(*args: Any, **kwargs: Any) -> Any:
                given: Any = args[0] if args else kwargs.get("iterable")
                self._listed = len(given) if hasattr(given, "__len__") else None
                bar = progress_bar(*args, **kwargs)
                return WatchedBar(bar, self._leave, self.said) if hasattr(bar, "__exit__") else bar

            self._patches.set(self.pipe, "progress_bar", watched_bar)

    def _hear(self) -> None:
        self._schedulers = self._held()
        for scheduler in self._schedulers:
            listen(scheduler, self._heard)
        own = getattr(self.pipe, "scheduler", None)
        self.scheduler = next(iter(self._schedulers), None) if own is None else own

    def _held(self) -> list[Any]:
        """The pipeline's schedulers, as they are now."""
        return [part for part in vars(self.pipe).values() if hasattr(type(part), "set_timesteps")]

    def _heard(self, scheduler: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of a scheduler's method, or of a copy's."""
        if not any(scheduler is own for own in self._schedulers):
            self._copied |= name == "step"
            return method(*args, **kwargs)
        if self._hearing:  # a method of the object that calls the class's own
            return method(*args, **kwargs)
        self._hearing = True
        try:
            return self._made(scheduler, name, method, args, kwargs)
        finally:
            self._hearing = False

    def _made(self, scheduler: Any, name: str, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if name == "step":
            return self._step(scheduler, method, args, kwargs)
        result = method(*args, **kwargs)
        if name == "set_timesteps":
            self._expect_run(scheduler)
        elif name == "scale_model_input" and self._pending and self._first_timestep is None:
            self._first_timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        return result

    def _step(self, scheduler: Any, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if self.run is None or scheduler is not self.scheduler or self._thread != threading.get_ident():
            return method(*args, **kwargs)
        given = dict(zip(self._takes, args, strict=False)) | kwargs
        at = self._place(given.get("timestep"))
        again = not self._called if None in (at, self._ticked) else at == self._ticked
        index = self.index - 1 if again else self.index
        self.repeats |= again
        args, kwargs = self._with_sample(index, args, kwargs)
        solve = None if again else self.solve
        result = method(*args, **kwargs) if solve is None else solve(method, args, kwargs)
        self.solved, self._ticked, self._called = result, at, False
        for listener in self.on_output:
            listener(index, given.get("model_output", next(iter(given.values()), None)))
        if not again:
            self._tick()
        return result

    def _with_sample(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of scheduler.step with the latents of `before_step`, which it calls `sample`."""
        # CogVideoX's DPM solver takes more before it
        place = self._takes.index("sample") if "sample" in self._takes else 2
        for change in self.before_step:
            if "sample" in kwargs:
                kwargs = {**kwargs, "sample": change(index, kwargs["sample"])}
            elif len(args) > place:
                args = (*args[:place], change(index, args[place]), *args[place + 1 :])
        return args, kwargs

    @property
    def upcoming(self) -> int | None:
        """The step whose denoiser calls come next, for what runs before them; None before a run's first call."""
        return self.index if self.run is not None and not self._pending else None

    def ours(self) -> bool:
        """Whether what runs now, in this thread, is the run in progress or to come."""
        return self._ours(running_pipeline())

    @property
    def number(self) -> int:
        """The number of the run in progress, or of the one to come."""
        return self._number + (self.run is None or self._pending)

    def check(self) -> None:
        """Raises NotReversible if `detach` would."""
        self._patches.check()

    def detach(self) -> None:
        self._patches.restore()
        self._deafen()
        self.abandon()

    def _deafen(self) -> None:
        for scheduler in self._schedulers:
            unlisten(scheduler, self._heard)
        self._schedulers = []

    def watch(self, denoiser: torch.nn.Module, name: str, patches: PatchSet) -> None:
        """Wrap the denoiser's forward; install last, so that every other patch runs inside the step it belongs to."""
        self._branches[name] = Branches(denoiser)

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def watched(*args: Any, **kwargs: Any) -> Any:
                with self._lock:
                    return self._within(name, forward, args, kwargs)

            vars(watched)[WATCHED] = self
            return watched

        patches.wrap_forward(denoiser, wrapper)
        context: Any = getattr(denoiser, "cache_context", None)
        if context is not None:
            patches.set(denoiser, "cache_context", self._named(context))

    def _within(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        named = next((kwargs[name] for name in _TIMES if name in kwargs), None)
        timestep = args[1] if named is None and len(args) > 1 else named
        step = None
        try:
            step = self._call(name, timestep, args, kwargs)
            if step is None:
                return forward(*args, **kwargs)
            self.now = step if step.branch != UNTOLD else None
            for callback in self.on_call:
                callback(step)
            result = forward(*args, **kwargs)
            for callback in self.on_return:
                callback(step)
        except BaseException:
            if step is not None:
                self.abandon()  # whatever was remembered of this run must not reach the next one
            raise
        finally:
            self.now = None
        return result

    def _named(self, context: Callable[..., AbstractContextManager]) -> Callable[..., AbstractContextManager]:
        """diffusers' `cache_context`, whose name tells a branch."""

        @contextmanager
        @wraps(context)
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            before, self._context = self._context, str(name)
            try:
                with context(name, *args, **kwargs) as given:
                    yield given
            finally:
                self._context = before

        return named

    def _call(self, denoiser: str, timestep: Any, args: tuple, kwargs: dict) -> Step | None:
        """The step that a call belongs to; no device synchronisation after the first call of a run."""
        self._follow()
        if self.run is None and not self._pending:
            return None
        pipe = running_pipeline()
        if not self._ours(pipe):
            self._note(_FOREIGN)
            return None
        if self._pending:
            self._begin(pipe, timestep, _latents(args, kwargs))
        at = self._place(timestep)
        again = self._fresh and at is not None and at == self._ticked  # one more view of a picture
        if self.run is not None and self.index >= self.run.total and not again and not self.open_ended:
            self.abandon()
        if self.run is None:
            return None
        if pipe is None and self._viewed and at is None:  # a loop over another scheduler's list
            self._note(_FOREIGN)
            return None
        if self._copied and not self._fresh:  # they step in the place of the scheduler
            self._note(_COPIES)
            self.abandon()
            return None
        self._copied, self._called = False, True
        if self._fresh and not again:
            self._turn()
        branch = self._branch(denoiser, args, kwargs)
        if branch == UNTOLD:
            self._note(_ALIKE)
        return Step(self.run, self.index - again, branch)

    def _branch(self, denoiser: str, args: tuple, kwargs: dict) -> int:
        return self._branches[denoiser].of(self._context, args, kwargs)

    def _turn(self) -> None:
        """The first call of a new step."""
        self._fresh = False
        for branches in self._branches.values():
            branches.turn()

    def _note(self, text: str) -> None:
        for callback in self.on_note if self.run is not None else ():
            callback(text)

    def _place(self, timestep: Any) -> int | None:
        return next((at for listed in self._lists if (at := place(timestep, listed)) is not None), None)

    def _ours(self, pipe: Any | None) -> bool:
        """Whether a call made here and now, by this pipeline, is of the run in progress or to come."""
        if self._thread not in (None, threading.get_ident()):
            return False
        return pipe is None or pipe is self.pipe or self.hears(pipe)

    def hears(self, pipe: Any) -> bool:
        """Whether a pipeline steps with one of the schedulers that this clock listens to."""
        return uses(pipe, self._schedulers)

    def _follow(self) -> None:
        """Listen to what took a scheduler's place after `attach`."""
        parts = self._held()
        if len(parts) == len(self._schedulers) and all(a is b for a, b in zip(parts, self._schedulers, strict=True)):
            return
        known = self._schedulers
        new = [part for part in parts if not any(part is old for old in known)]
        self._deafen()
        self._hear()
        for scheduler in new:
            if getattr(scheduler, "num_inference_steps", None) is not None:
                self._expect_run(scheduler)

    def abandon(self) -> None:
        """Forget the run in progress, after an exception."""
        run, self.run, self._pending = self.run, None, False
        if run is not None:
            for callback in self.on_end:
                callback(run)

    def _leave(self) -> None:
        """The loop is left: at its end, by an interrupt, or by an exception outside the denoiser."""
        if self.run is not None and self._thread == threading.get_ident():
            self.abandon()

    def _expect_run(self, scheduler: Any) -> None:
        """Whoever sets the timesteps of a scheduler begins anew with it."""
        self.abandon()
        self.scheduler, self._thread = scheduler, threading.get_ident()
        self._pending, self._first_timestep, self._listed = True, None, None
        self._lists = [scheduler.timesteps] if hasattr(scheduler, "timesteps") else []
        for callback in self.on_expect:
            callback()

    def _begin(self, pipe: Any | None, timestep: Any, latents: torch.Tensor) -> None:
        scheduler = self.scheduler
        self._pending = False
        grid = [] if self.open_ended else torch.as_tensor(scheduler.timesteps).flatten().tolist()
        listed = [float(t) for t in grid]
        if not listed and not self.open_ended:
            return
        if all(scheduler.timesteps is not known for known in self._lists):  # cut off, or a state that was put back
            self._lists.append(scheduler.timesteps)
        length = loop_length(pipe) if pipe is not None else None
        first = self._first_timestep if self._first_timestep is not None else timestep
        begin, end = span(scheduler, listed, pipe, self._listed if length is None else length, first)
        sigmas, flow = noise_levels(scheduler, listed)
        self._number += 1
        guidance = getattr(pipe or self.pipe, "guidance_scale", None)
        self.run = Run(
            self._number, tuple(listed[begin:end]), tuple(sigmas[begin:end]), flow, type(scheduler).__name__,
            float(guidance) if isinstance(guidance, int | float) else None, tuple(latents.shape[1:]), begin > 0,
            latents.device, next((name for name, part in vars(self.pipe).items() if part is scheduler), "scheduler"),
        )  # fmt: skip
        self.index, self._ticked, self._called, self._copied, self.repeats = 0, None, False, False, False
        self._viewed = self._place(timestep) is not None
        self._takes = list(inspect.signature(type(scheduler).step).parameters)[1:]
        for branches in self._branches.values():
            branches.begin()
        self._turn()
        for callback in self.on_start:
            callback(self.run)

    def _tick(self) -> None:
        assert self.run is not None
        for callback in self.on_tick:
            callback(self.index)
        self.index += 1
        self._fresh = True
        if self.index >= self.run.total and not self.open_ended and not self.repeats:
            self.abandon()  # else the last step may be stepped again


def _latents(args: tuple, kwargs: dict) -> torch.Tensor:
    """The denoiser's input."""
    tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim > 1)
    return next(tensors, torch.empty(0))
