"""Moments of a device's work. A host that only launches work is done long before it: events say when it was."""

from __future__ import annotations

import time

import torch

_EVENTS = ("cuda", "xpu", "mps")  # devices whose work is only launched by the host


class Moments:
    """Marked while work is launched, read once when all of it is: nothing in between waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: list[float] = []
        self._events: list[torch.Event] = []
        self.mark()

    def mark(self) -> None:
        """The work launched so far is done at this moment."""
        self._host.append(time.perf_counter())
        if self.device.type in _EVENTS:
            event = torch.Event(self.device, enable_timing=True)
            event.record(torch.accelerator.current_stream(self.device))
            self._events.append(event)

    def host_seconds(self) -> list[float]:
        """Seconds between the marks as the host saw them."""
        return [b - a for a, b in zip(self._host, self._host[1:], strict=False)]

    def seconds(self) -> list[float]:
        """Seconds between the marks on the device; waits for the last of them, where the device has events."""
        if not self._events:
            return self.host_seconds()
        self._events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self._events, self._events[1:], strict=False)]
