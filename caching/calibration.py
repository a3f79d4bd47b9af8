"""Sessions that leave nothing out: they show a method's regions, or what its predictions should have been."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import nn

from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.clock import Run, Step, StepClock
from fastdiff.recorder import Recorder
from fastdiff.timing import settle

from .base import CacheMethod
from .protocols import Install, Sample
from .region import Memory, Region
from .session import Session


class Loops:
    """Which denoiser was called at which steps of which run, in one pass over all prompts."""

    def __init__(self) -> None:
        self.complete: list[Run] = []
        self._called: dict[int, dict[str, set[int]]] = {}  # by number of the run and component

    def listen(self, clock: StepClock) -> None:
        clock.on_end.append(lambda run: self.complete.append(run) if clock.index >= run.total else None)

    def ear(self, component: str, now: Callable[[], Step | None]) -> Callable[..., Any]:
        """What wraps a denoiser's forward."""

        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def heard(*args: Any, **kwargs: Any) -> Any:
                step = now()
                if step is not None:
                    self._called.setdefault(step.run.number, {}).setdefault(component, set()).add(step.index)
                return forward(*args, **kwargs)

            return heard

        return wrapper

    def calls(self, run: Run) -> dict[str, list[int]]:
        """Steps of a run by the component that was called in them."""
        return {name: sorted(steps) for name, steps in self._called.get(run.number, {}).items()}


@dataclass
class Drawing:
    """The calibrator of one denoiser of a live pipeline.

    `weights` is how the model was quantized while it was drawn; after that it may be back to floats.
    """

    anatomy: Anatomy
    weights: str | None = None
    loops: Loops = field(default_factory=Loops)  # of the pass under way, or the last

    @property
    def run(self) -> Run:
        """The last complete run in which the denoiser was called. Raises ValueError if there was none."""
        own = [run for run in self.loops.complete if self.heard(run)]
        if not own:
            raise ValueError(f"no complete run was seen in which the {self.anatomy.component} was called")
        return own[-1]

    def parts(self, run: Run) -> dict[str, list[int]]:
        """The steps of a run in which each denoiser was called, by component; this one's first."""
        found = self.loops.calls(run)
        return {self.anatomy.component: found[self.anatomy.component], **found}

    def heard(self, run: Run) -> bool:
        """Whether the denoiser was called in a run."""
        return self.anatomy.component in self.loops.calls(run)

    def origin(self, run: Run) -> dict[str, Any]:
        """What a plan says of the run it was made on."""
        called = self.loops.calls(run).get(self.anatomy.component, [])
        return {
            "denoiser": fingerprint(self.anatomy),
            "quantization": self.weights,
            "scheduler": run.scheduler,
            "guidance_scale": run.guidance_scale,
            "shape": run.shape,
            "sigmas": run.sigmas,
            "called": tuple(called) if len(called) < run.total else (),
        }

    def observe(
        self, method: CacheMethod, seen: Callable[[Sample], None], *, regions: Sequence[Region] = ()
    ) -> Generator[Install, None, Run]:
        """An uncached pass that shows the value of each region in each call; returns `run`."""
        yield lambda anatomy, clock, recorder: Recording(method, anatomy, clock, recorder, seen, regions)
        return self.run


class Recording(Session):
    """Computes every step and shows what each region gave."""

    def __init__(
        self, method: CacheMethod, anatomy: Anatomy, clock: StepClock, recorder: Recorder,
        seen: Callable[[Sample], None], regions: Sequence[Region] = (),
    ) -> None:  # fmt: skip
        super().__init__(method, anatomy, clock, recorder, regions=regions)
        self.seen = seen

    def _start(self, run: Run) -> None:
        self._branches, self._shapes = {}, {}
        self.masks = [[True] * run.total for _ in self.regions]
        self._needed = [[True] * run.total for _ in self.regions]

    def _end(self, run: Run) -> None:
        self._branches, self._current = {}, None

    def _gate(self, number: int, region: Region, memory: Memory, inputs: dict[str, Any]) -> None:
        if region.probe is not None and region.probe.module is None:
            memory.probe = region.probe.read(inputs, None)

    def commit(self, index: int) -> None:
        step = self.clock.now
        for number, memory in enumerate(self._current or ()):
            if memory.taken is not None and step is not None:
                self.seen(Sample(step, number, memory.taken, memory.probe))
                memory.taken = None


class Shadow(Session):
    """Runs a method's schedule, but computes the cached steps too, and shows (step, region, prediction, truth).

    The model goes on with what `seen` makes of the prediction, so that the truth is that of the cached trajectory.
    """

    def __init__(
        self, method: CacheMethod, anatomy: Anatomy, clock: StepClock, recorder: Recorder,
        seen: Callable[[Step, int, list[Any], list[Any]], list[Any]],
    ) -> None:  # fmt: skip
        super().__init__(method.model_copy(update={"guard": "none"}), anatomy, clock, recorder)
        self.seen = seen

    def _decide(self, number: int, step: Step, memory: Memory, wanted: bool) -> None:
        super()._decide(number, step, memory, wanted)
        memory.shadowed, memory.skipping = memory.skipping, False
        memory.keep = memory.keep or memory.shadowed

    def _take(self, number: int, region: Region, memory: Memory, output: Any) -> Any:
        output = super()._take(number, region, memory, output)
        if not memory.shadowed or memory.taken is None:
            return output
        step = self.clock.now
        assert step is not None
        truth, memory.taken = memory.taken, None
        memory.ready = self.seen(step, number, self._combined(number, memory, step.index), truth)
        return self._serve(number, region, memory)


class Stopwatch:
    """Seconds that regions take, by name, measured with hooks that wait for the device."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, regions: Sequence[Region]) -> Iterator[None]:
        with ExitStack() as hooks:
            for region in regions:
                for unit in region.units:
                    self._hook(region.name, unit, hooks)
            yield

    def _hook(self, name: str, unit: nn.Module, hooks: ExitStack) -> None:
        begun: list[float] = []
        weight = next(unit.parameters(), None)

        def now() -> float:
            if weight is not None:
                settle(weight.device)
            return time.perf_counter()

        def ended(*_: Any) -> None:
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - begun.pop()

        hooks.enter_context(unit.register_forward_pre_hook(lambda *_: begun.append(now())))
        hooks.enter_context(unit.register_forward_hook(ended))
