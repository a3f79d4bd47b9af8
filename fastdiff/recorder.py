"""Fills a RunReport from the clock."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .clock import Run, Step, StepClock
from .report import ABSENT, CACHED, COMPUTED, RunReport, peak_memory_mb
from .timing import Moments


class Recorder:
    """Keeps the report of the last run; a method that leaves work out calls `skipped()` inside a denoiser call."""

    def __init__(self, clock: StepClock) -> None:
        self.report = RunReport()
        self._moments: Moments | None = None
        self._loops: dict[str, str] = {}  # what the loops of the present call did before this one, by scheduler
        self.skipping = self._predicted = self._elsewhere = False
        self.forecasts: list[Sequence[float]] = []  # of the present call: factors of values that others were made of
        clock.on_start.append(self._start)
        clock.on_call.append(self._call)
        clock.on_return.append(self._return)
        clock.on_tick.append(self._tick)
        clock.on_end.append(self._end)
        clock.on_note.append(self.note)
        clock.said = lambda: f"{self.report.cached} saved" if self.report.cached else ""

    def skipped(self, *, predicted: bool = False, forecasts: Sequence[Sequence[float]] = ()) -> None:
        self.skipping, self._predicted = True, self._predicted or predicted
        self.forecasts += forecasts

    def pictures(self, branch: int, computed: Sequence[int], count: int) -> None:
        """Which of the pictures of a batch the present call of a branch computes; until the first they were alike."""
        known = self.report.pictures.get(branch, [self.report.branches.get(branch, []).count(COMPUTED)] * count)
        self.report.pictures[branch] = [steps + (picture in computed) for picture, steps in enumerate(known)]

    def again(self) -> None:
        """The present call is made again in full."""
        self.skipping = self._predicted = False
        self.forecasts = []

    def elsewhere(self) -> None:
        """The present call of the denoiser is made by another rank."""
        self._elsewhere = True

    def note(self, text: str) -> None:
        """Something the user should know of this run; said once."""
        if text not in self.report.notes:
            self.report.notes.append(text)

    def _start(self, run: Run) -> None:
        if run.loop in self._loops:  # once more the same: another call of the pipeline
            self._loops = {}
        self.report = RunReport(total=run.total, notes=[*self._loops.values()])
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        self._moments = Moments(run.device)

    def _call(self, step: Step) -> None:
        self.skipping = self._predicted = self._elsewhere = False
        self.forecasts = []

    def _return(self, step: Step) -> None:
        row = self.report.branches.setdefault(step.branch, [])
        row.extend([ABSENT] * (step.index + 1 - len(row)))
        if row[step.index] != COMPUTED and not self._elsewhere:  # of two denoisers in one step, computing wins
            row[step.index] = CACHED if self.skipping else COMPUTED
        if self._predicted:
            self.report.predicted.add(step.index)

    def _tick(self, index: int) -> None:
        if self._moments is not None:
            self._moments.mark()
            self.report.step_seconds = self.report.host_seconds = self._moments.host_seconds()

    def _end(self, run: Run) -> None:
        """The device is waited for once a run; asking for the peak takes milliseconds on some systems."""
        if self._moments is not None:
            self.report.step_seconds = self._moments.seconds()
        self.report.peak_memory_mb = peak_memory_mb(run.device)
        said = f"{self.report.steps} steps, {self.report.cached} cached, {self.report.seconds:.2f} s"
        self._loops[run.loop] = f"the loop of {run.loop} before it: {said}"
