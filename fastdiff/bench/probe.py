"""Stopwatch and memory gauge around one pipeline call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fastdiff.pipelines.families import denoisers

_RESET_PEAK = "5"  # see proc(5), clear_refs


class Probe:
    """Measures the body of a `with`: `seconds`, `denoising_seconds`, `peak_memory_mb` (None where it is unknown).

    Listens to the denoisers with torch's own hooks, so that accelerated, stock and foreign pipelines are all timed by
    the same means.
    """

    def __init__(self, pipe: Any) -> None:
        self.seconds = self.denoising_seconds = 0.0
        self.peak_memory_mb: float | None = None
        self._cuda = pipe.device.type == "cuda"
        self._denoisers = list(denoisers(pipe).values())
        self._hooks: list[Any] = []
        self._first: Any = None
        self._last: Any = None
        self._resettable = True

    def __enter__(self) -> Probe:
        for module in self._denoisers:
            self._hooks.append(module.register_forward_pre_hook(self._began))
            self._hooks.append(module.register_forward_hook(self._ended))
        self._reset_peak()
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._now() - self._start
        for hook in self._hooks:
            hook.remove()
        if self._last is not None and self._cuda:
            self.denoising_seconds = self._first.elapsed_time(self._last) / 1e3
        elif self._last is not None:
            self.denoising_seconds = self._last - self._first
        self.peak_memory_mb = self._peak()

    def _began(self, *_: Any) -> None:
        if self._first is None:
            self._first = self._mark()

    def _ended(self, *_: Any) -> None:
        self._last = self._mark()

    def _mark(self) -> Any:
        """A moment of the device: waiting for it here would slow down what is measured."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        except OSError:  # not Linux, or not allowed; the peak since the process started would mean nothing
            self._resettable = False

    def _peak(self) -> float | None:
        if self._cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        if not self._resettable:
            return None
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        kilobytes = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
        return None if kilobytes is None else int(kilobytes) * 1024 / 1e6
