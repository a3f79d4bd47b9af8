"""Stopwatch and memory gauge around one pipeline call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fastdiff.pipelines.families import denoisers
from fastdiff.timing import Moments, settle

_RESET_PEAK = "5"  # see proc(5), clear_refs


class Probe:
    """Measures the body of a `with`: `seconds`, `denoising_seconds`, `peak_memory_mb` (None where it is unknown).

    Listens to the denoisers with torch's own hooks, so that accelerated, stock and foreign pipelines are all timed by
    the same means.
    """

    def __init__(self, pipe: Any) -> None:
        self.seconds = self.denoising_seconds = 0.0
        self.peak_memory_mb: float | None = None
        self._device: torch.device = getattr(pipe, "_execution_device", pipe.device)  # not where offloading parks it
        self._denoisers = list(denoisers(pipe).values())
        self._hooks: list[Any] = []
        self._moments: Moments | None = None
        self._resettable = True

    def __enter__(self) -> Probe:
        for module in self._denoisers:
            self._hooks.append(module.register_forward_pre_hook(self._began))
            self._hooks.append(module.register_forward_hook(self._ended))
        self._reset_peak()
        settle(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        settle(self._device)
        self.seconds = time.perf_counter() - self._start
        for hook in self._hooks:
            hook.remove()
        self.denoising_seconds = sum(self._moments.seconds()) if self._moments is not None else 0.0
        self.peak_memory_mb = self._peak()

    def _began(self, *_: Any) -> None:
        self._moments = self._moments or Moments(self._device)

    def _ended(self, *_: Any) -> None:
        if self._moments is not None:
            self._moments.mark()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        except OSError:  # not Linux, or not allowed; the peak since the process started would mean nothing
            self._resettable = False

    def _peak(self) -> float | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        if not self._resettable:
            return None
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        kilobytes = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
        return None if kilobytes is None else int(kilobytes) * 1024 / 1e6
