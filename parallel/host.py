"""Blocks whose weights stay in the memory of the host: a device streams a model that is larger than itself.

The engine is that of `shards`, with the host in the place of the other ranks: while a block computes, the next one is
copied up, from pinned memory and by a stream of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kept import Kept
from .shards import Keeper


class Host(Keeper):
    """Keeps all bytes of every block in the host's memory, pinned where the device copies by itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.Stream(device) if device.type != "cpu" else None

    def keep(self, whole: Tensor, size: int) -> Tensor:
        share = whole.cpu()
        return share if self.side is None else share.pin_memory(self.device)

    def fetch(self, kept: Kept) -> tuple[Tensor, Any]:
        if self.side is None:
            return kept.share.clone(), None
        room = torch.empty(kept.size, dtype=torch.uint8, device=self.device)
        self.side.wait_stream(torch.accelerator.current_stream(self.device))  # its memory may be in use until then
        with self.side:
            room.copy_(kept.share, non_blocking=True)
        return room, self.side.record_event()

    def land(self, kept: Kept) -> None:
        if self.side is not None:
            torch.accelerator.current_stream(self.device).wait_event(kept.coming)
