"""Fills a RunReport from the clock."""

from __future__ import annotations

import time

import torch

from .clock import Run, Step, StepClock
from .report import ABSENT, CACHED, COMPUTED, RunReport, peak_memory_mb


class Recorder:
    """Keeps the report of the last run; a method that leaves work out calls `skipped()` inside a denoiser call."""

    def __init__(self, clock: StepClock, device: torch.device) -> None:
        self.report = RunReport()
        self.device = device
        self._skipped = self._predicted = self._elsewhere = False
        self._mark = 0.0
        clock.on_start.append(self._start)
        clock.on_call.append(self._call)
        clock.on_return.append(self._return)
        clock.on_tick.append(self._tick)
        clock.on_end.append(self._end)
        clock.on_note.append(self.note)

    def skipped(self, *, predicted: bool = False) -> None:
        self._skipped, self._predicted = True, self._predicted or predicted

    def again(self) -> None:
        """The present call is made again in full."""
        self._skipped = self._predicted = False

    def elsewhere(self) -> None:
        """The present call of the denoiser is made by another rank."""
        self._elsewhere = True

    def note(self, text: str) -> None:
        """Something the user should know of this run; said once."""
        if text not in self.report.notes:
            self.report.notes.append(text)

    def _start(self, run: Run) -> None:
        self.report = RunReport(total=run.total)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._mark = time.perf_counter()

    def _call(self, step: Step) -> None:
        self._skipped = self._predicted = self._elsewhere = False

    def _return(self, step: Step) -> None:
        row = self.report.branches.setdefault(step.branch, [])
        row.extend([ABSENT] * (step.index + 1 - len(row)))
        if row[step.index] != COMPUTED and not self._elsewhere:  # of two denoisers in one step, computing wins
            row[step.index] = CACHED if self._skipped else COMPUTED
        if self._predicted:
            self.report.predicted.add(step.index)

    def _tick(self, index: int) -> None:
        if index + 1 == self.report.total and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once a run, so that the seconds are not those of the launches alone
        now = time.perf_counter()
        self.report.step_seconds.append(now - self._mark)
        self._mark = now

    def _end(self, run: Run) -> None:
        """Asking for the peak takes milliseconds on some systems, so not at every step."""
        self.report.peak_memory_mb = peak_memory_mb(self.device.type)
