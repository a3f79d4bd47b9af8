"""Numbers that a device works out and the host wants later, without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor


class Reading:
    """Numbers on their way to the host. The first look waits, and only if they have not arrived yet."""

    def __init__(self, numbers: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._sent = numbers.detach()
        if numbers.is_cuda:
            self._sent = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._sent.copy_(numbers.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))  # whose copy it is, whatever is current

    @cached_property
    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._sent.flatten().tolist()
        return found

    def __float__(self) -> float:
        return self.values[0]


class Together:
    """Numbers that go to the host in one copy; each is known once all have left."""

    def __init__(self) -> None:
        self._numbers: list[Tensor] = []

    def add(self, number: Tensor) -> Callable[[], float]:
        place = len(self._numbers)
        self._numbers.append(number.detach())
        return lambda: self._reading.values[place]

    def leave(self) -> None:
        if self._numbers:
            first = self._numbers[0]
            self._reading = Reading(torch.stack([number.to(first.device, first.dtype) for number in self._numbers]))
            self._numbers = []


def peak(leaves: list) -> Tensor:
    """The largest magnitude in some tensors; not a number if they hold one."""
    norms = [torch.linalg.vector_norm(leaf, ord=torch.inf).float() for leaf in leaves if isinstance(leaf, Tensor)]
    return torch.stack(norms).amax()


def unbounded(leaves: list) -> bool:
    """Whether sums of a few of these numbers need no bound that the host would wait for: they lie on a device, in a
    type of float32's range. On a CPU looking costs nothing."""
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(leaf.device.type != "cpu" and torch.finfo(leaf.dtype).max > 1e30 for leaf in floats)
