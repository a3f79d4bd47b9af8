"""A pipeline whose denoiser's blocks stay in the memory of the host, and are copied up one ahead of the other."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.errors import BadConfig
from fastdiff.parallel.host import Host
from fastdiff.parallel.shards import Shelf, units
from fastdiff.patch import PatchSet
from fastdiff.weights import require

from .families import anatomies


class Streamed:
    """What `stream` did to a pipeline. `restore()` takes it back; as a context manager it does so at the end.

    `held` is what the denoisers need on the device, in bytes: what is no block, and the two largest blocks.
    """

    def __init__(self, patches: PatchSet, held: int) -> None:
        self._patches, self.held = patches, held

    def restore(self) -> None:
        """Put all weights back where they were. Raises NotReversible if something was patched on top since."""
        self._patches.restore()

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def stream(pipe: Any, device: torch.device | str | None = None) -> Streamed:
    """Compute a pipeline on a device (default: the accelerator, else the CPU) that its denoiser's weights do not fit.

    Blocks stay in the host's memory, and each is copied up while the one before it computes; all else moves to the
    device. Before `accelerate`, whose caches then spare the copies of what they skip; restore in the other order. The
    result is that of the same pipeline on the device, to the bit.

    Raises BadConfig for a pipeline that is on the device already, UnsupportedModel where no blocks are described, or
    weights are not plain numbers in memory.
    """
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    target, before, found = torch.device(device or own or "cpu"), pipe.device, anatomies(pipe)
    if before.type == target.type != "cpu":
        raise BadConfig(f"the pipeline is on {before} already: load it on the CPU, and do not move it before `stream`")
    for anatomy in found:
        require(anatomy.denoiser, f"the {anatomy.component}")
    shelves = [Shelf(units(anatomy), anatomy.denoiser, Host(target), target) for anatomy in found]
    patches = PatchSet()
    with patches:
        patches.call(lambda: None, lambda: pipe.to(before))
        for shelf in shelves:
            shelf.install(patches)
        pipe.to(target)
    rest = sum(t.untyped_storage().nbytes() for a in found for t in (*a.denoiser.parameters(), *a.denoiser.buffers()))
    return Streamed(patches, rest + sum(sum(sorted(k.size for k in shelf.kept)[-2:]) for shelf in shelves))
