"""What a cache method may ask of the session that runs it, and of the calibration that fills its settings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step, StepClock
from fastdiff.patch import PatchSet
from fastdiff.recorder import Recorder

from .region import Region

Install = Callable[[Anatomy, StepClock, Recorder], Any]  # what a pass of a calibration puts in a cache's place
Passes = Generator[Install, None, Any]  # asks for passes over all prompts, and returns what it made of them


class Live(Protocol):
    """A method at work on one denoiser (`session.Session`)."""

    anatomy: Anatomy
    clock: StepClock
    recorder: Recorder
    patches: PatchSet
    regions: list[Region]
    masks: list[list[bool] | None]

    def weigh(self, index: int, anchors: Sequence[int]) -> Sequence[float]:
        """The present run's factors for step `index` of the newest of the values computed at `anchors`."""
        ...

    def predicted(self, number: int, index: int) -> list[Any]:
        """The leaves of what a region would give at a step."""
        ...

    def commit(self, index: int) -> None:
        """Put what was taken in this step into the histories."""
        ...

    def skipping(self, number: int) -> bool:
        """Whether a region is left out in the present call."""
        ...

    def overlook(self) -> None:
        """Nothing of the present call is remembered: it is one of fewer rows."""
        ...

    def forget(self) -> None:
        """What is remembered holds no longer: compute anew."""
        ...


@dataclass(frozen=True)
class Sample:
    """What one call of the denoiser showed of a region: the value that would be kept, and its probe."""

    step: Step
    number: int
    value: list[Any]
    probe: Tensor | None


class Calibrator(Protocol):
    """What a method may know of the passes in which its plan for one denoiser is made (`calibration.Drawing`)."""

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def run(self) -> Run:
        """The last complete run in which the denoiser was called. Raises ValueError if there was none."""
        ...

    def parts(self, run: Run) -> dict[str, list[int]]:
        """The steps of a run in which each denoiser was called, by component; this one's first."""
        ...

    def heard(self, run: Run) -> bool:
        """Whether the denoiser was called in a run of the pass under way."""
        ...

    def origin(self, run: Run) -> dict[str, Any]:
        """What a plan says of the run it was made on."""
        ...

    def observe(
        self, method: Any, seen: Callable[[Sample], None], *, regions: Sequence[Region] = ()
    ) -> Generator[Install, None, Run]:
        """An uncached pass that shows the value of each region in each call; returns `run`."""
        ...
