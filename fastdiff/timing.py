"""Moments of a device's work. A host that only launches work is done long before it: events say when it was."""

from __future__ import annotations

import time

import torch

_EVENTS = ("cuda", "xpu", "mps")  # devices whose work is only launched by the host


def moment(device: torch.device) -> torch.Event:
    """A mark behind the work that a device was given so far."""
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def settle(device: torch.device) -> None:
    """Come back when the device has done all that it was given."""
    if device.type in _EVENTS:
        torch.accelerator.synchronize(device)


class Leash:
    """Lets the host be one step ahead of the device, which so always has work, and no more."""

    def __init__(self) -> None:
        self._last: torch.Event | None = None

    def step(self, device: torch.device) -> None:
        last, self._last = self._last, moment(device) if device.type in _EVENTS else None
        if last is not None:
            last.synchronize()


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
            self._events.append(moment(self.device))

    def host_seconds(self) -> list[float]:
        """Seconds between the marks as the host saw them."""
        return [b - a for a, b in zip(self._host, self._host[1:], strict=False)]

    def seconds(self) -> list[float]:
        """Seconds between the marks on the device; waits for the last of them, where the device has events."""
        if not self._events:
            return self.host_seconds()
        self._events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self._events, self._events[1:], strict=False)]
