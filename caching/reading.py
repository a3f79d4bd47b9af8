"""Numbers that a device works out and the host wants later, without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """A scalar on its way to the host; `float()` waits only if it has not arrived yet."""

    def __init__(self, scalar: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._value = scalar.detach()
        if scalar.is_cuda:
            self._value = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._value.copy_(scalar.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(scalar.device))  # whose copy it is, whatever is current

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


def peak(leaves: list) -> Reading:
    """The largest magnitude in some tensors; not a number if they hold one."""
    found = [torch.linalg.vector_norm(leaf, ord=torch.inf).float() for leaf in leaves if isinstance(leaf, Tensor)]
    return Reading(found[0] if len(found) == 1 else torch.stack(found).amax())


def unbounded(leaves: list) -> bool:
    """Whether sums of a few of these numbers need no bound that the host would wait for: they lie on a device, in a
    type of float32's range. On a CPU looking costs nothing."""
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(leaf.device.type != "cpu" and torch.finfo(leaf.dtype).max > 1e30 for leaf in floats)
