"""What is kept of a block whose weights are not here: bytes in equal shares, and where each tensor lies among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64  # bytes: what any number, and any kernel, may ask of an address


@dataclass(frozen=True)
class View:
    """A tensor of a block, and where it lies among all bytes of it."""

    tensor: Tensor
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        place = whole[self.begin : len(whole) - (len(whole) - self.begin) % self.dtype.itemsize].view(self.dtype)
        return place.as_strided(self.shape, self.stride, place.storage_offset())


@dataclass(eq=False)
class Kept:
    """One block. share: the bytes that are kept, of `size` for each part of it; `here`: all bytes, while they are here
    or on their way (`coming`)."""

    number: int
    device: torch.device
    size: int
    share: Tensor
    views: list[View] = field(default_factory=list)
    here: Tensor | None = None
    coming: Any = None

    @property
    def name(self) -> str:
        return f"the weights of block {self.number}"

    def packed(self, parts: int = 1) -> Tensor:
        """All bytes, in `parts` shares, of the tensors as they are."""
        home = self.views[0].tensor.device if self.views else self.device
        whole = torch.zeros(self.size * parts, dtype=torch.uint8, device=home)
        for view in self.views:
            view.of(whole).copy_(view.tensor)
        return whole

    def fill(self) -> None:
        for view in self.views:
            assert self.here is not None
            view.tensor.data = view.of(self.here)

    def empty(self) -> None:
        """One number stands for all tensors of a type: not a number, so that nobody takes it for a weight."""
        self.here = self.coming = None
        numbers: dict[torch.dtype, Tensor] = {}
        for view in self.views:
            if view.dtype not in numbers:
                number = math.nan if view.dtype.is_floating_point else 0
                numbers[view.dtype] = torch.full((), number, dtype=view.dtype, device=self.device)
            view.tensor.data = numbers[view.dtype].expand(view.shape)


def share_of(total: int, parts: int) -> int:
    """Bytes of each of so many equal shares."""
    return aligned(-(-total // parts))


def aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
