"""What a cache holds: counted as it grows, foreseen in the first computed step, refused where it cannot fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastdiff.anatomy import Anatomy
from fastdiff.errors import DoesNotFit
from fastdiff.memory import free
from fastdiff.recorder import Recorder

from .base import CacheMethod
from .region import Memory, Region, tensors


def bytes_of(leaves: Sequence[Any]) -> int:
    return sum(leaf.nbytes for leaf in tensors(leaves))


class Holding:
    """Bytes of the remembered values of one session, of all branches of a run."""

    def __init__(
        self, method: CacheMethod, anatomy: Anatomy, regions: Sequence[Region], recorder: Recorder
    ) -> None:  # fmt: skip
        self.method, self.recorder = method, recorder
        # the same place in each block holds the same, but in a UNet, where sizes change
        alike = anatomy.family.kind != "unet"
        self._kinds = [re.sub(r"\d+", "#", region.name) if alike else region.name for region in regions]
        self._counts = Counter(self._kinds)
        self.forget()

    def forget(self) -> None:
        self.sample = self._held = self._taken = 0
        self.values = self.method.history
        self._ones: dict[int, dict[str, int]] = {}  # of each branch, bytes of one value of all regions of a kind

    def start(self, computed: int) -> None:
        """A run that computes so many steps, at most."""
        self.forget()
        self.values = min(self.values, computed)

    def enter(self, sample: int) -> None:
        """sample: bytes of what the denoiser is given, and about of what it gives."""
        self.sample = sample

    def take(self, branch: int, number: int, leaves: Sequence[Any]) -> None:
        """A branch takes its first value of a region: those like it will hold as much, as many as the method reads.

        Raises DoesNotFit, with what would, where that is more than is free.
        """
        self._taken += bytes_of(leaves)
        ones, kind = self._ones.setdefault(branch, {}), self._kinds[number]
        if kind in ones or not (found := tensors(leaves)):
            return
        ones[kind] = bytes_of(found) * self._counts[kind]
        room = free(found[0].device)
        if self.foreseen - self._held - self._taken > room:
            raise DoesNotFit(self._said(found[0].device, room))

    def take_all(self, branch: int, memories: Sequence[Memory]) -> None:
        """`take`, of all that a call gave at once."""
        for number, memory in enumerate(memories):
            if memory.taken is not None and not memory.values:
                self.take(branch, number, memory.taken)

    @property
    def foreseen(self) -> int:
        """Bytes of all values of the regions seen so far."""
        return self.values * sum(sum(ones.values()) for ones in self._ones.values())

    def count(self, memories: Iterable[Memory]) -> None:
        """What is held now, after a step that was computed."""
        self._taken = 0
        self._held = sum(bytes_of(value) for memory in memories for value in memory.values)
        self.recorder.report.cache_mb = max(self.recorder.report.cache_mb, self._held / 1e6)

    def _said(self, device: torch.device, room: float) -> str:
        kept, count = self.values, len(self._kinds)
        told = (
            f"{self.method.method} would hold {_mb(self.foreseen)} or more ({count} regions, {kept} values of each, "
            f"{len(self._ones)} or more calls a step); {device} has {_mb(room)} free"
        )
        if kept > 1:
            told += f'; cache.predictor = "reuse" would hold {_mb(self.foreseen // kept)}'
        if count > 1:
            told += f"; a method that leaves out the whole model (ab_cache, dp) about {_mb(self.sample * kept)}"
        return told + "; or draw a smaller picture, fewer at once, or fewer frames"


def _mb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
