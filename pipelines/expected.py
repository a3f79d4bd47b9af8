"""Says what each rank will hold before anything is loaded, and refuses what cannot be, with what would."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastdiff import memory
from fastdiff.errors import BackendUnavailable, FastdiffError, UnsupportedModel
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.mesh import join
from fastdiff.parallel.methods.patch import Patch

from .loading import where
from .portioned import WHOLE, obstacle, readable
from .quantized_parts import is_quantized
from .room import Room, Sizes, gib
from .sources import source

_SLACK = 1.15  # of what is counted: activations, allocators, kernels' workspaces and what torch itself takes
_MOST = 64  # devices that are thought of, where so many as there are do not do
_SMALLEST = "quant.method = w4a16 with quant.speed = smallest"


def expect(
    model: str, method: ParallelMethod, dtype: torch.dtype | None, quantizes: bool, offload: str = "none"
) -> list[str]:
    """What rank 0 has to say before all ranks load a model. Nothing is counted of one whose files are not here, or that
    is quantized or offloaded; ranks of one machine share its memory out.

    Raises BadConfig where this process is no rank of the method's, BackendUnavailable where weights cannot fit.
    """
    device, kind = _where(dtype)
    rank = join(method.devices, device, method.timeout)
    reason = obstacle(model, quantizes, offload)
    sizes = _sizes(model, kind) if reason is None else None
    if sizes is None:
        return [WHOLE + reason] if method.shard and reason and rank == 0 else []
    ranks, have = dist.get_world_size(), _share(device)
    try:
        if method.shard and not is_quantized(Path(source(model))):
            readable(Path(source(model)), kind)
    except UnsupportedModel as error:
        reason = str(error)
    room = sizes.room(method, ranks, by_shares=reason is None)
    sharers = ranks if device.type == "cpu" else 1
    if room.peak - room.mapped * (1 - 1 / sharers) > have:
        raise BackendUnavailable(f"{room}, and has {gib(have)}: {_instead(sizes, method, ranks, have)}")
    said = [str(room)] + ([WHOLE + reason] if reason else [])
    if _SLACK * room.peak > have:
        said.append(f"warning: it has {gib(have)}, likely too little: {_instead(sizes, method, ranks, have)}")
    return said if rank == 0 else []


def foresee(model: str, devices: int, dtype: torch.dtype | None, have: float | None) -> list[str]:
    """What each of so many ranks would hold, with all weights and with shares of them.

    have: bytes of a device; default: what is free on one like this, of a CPU a part of it. Raises BackendUnavailable
    where not even shares can fit, or where all weights, with which a step is measured, do not fit this machine.
    """
    device, kind = _where(dtype)
    here, method, sizes = memory.free(device), Patch(method="patch", devices=devices), _sizes(model, kind)
    have = have or here / (devices if device.type == "cpu" else 1)
    if sizes is None:
        return []
    shared = method.model_copy(update={"shard": "blocks"})
    whole, room = sizes.room(None, devices), sizes.room(shared, devices)
    if min(room.peak, whole.peak) > have:
        raise BackendUnavailable(f"{room}, and has {gib(have)}: {_instead(sizes, shared, devices, have)}")
    if whole.peak > here:
        raise BackendUnavailable(
            f"{room} with parallel.shard = blocks, but a plan measures a step with all {gib(whole.peak)} of them here, "
            f"where {gib(here)} are left: fastdiff advise counts and measures nothing"
        )
    return [str(whole), f"{room}, with parallel.shard = blocks"]


def _where(dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    device, kind = where(None, dtype)
    return torch.device(device), kind


def _sizes(model: str, dtype: torch.dtype) -> Sizes | None:
    """None where it takes loading to know: a single file, a hub id, a model without blocks or that is broken."""
    try:
        folder = Path(source(model))
        return Sizes.of(folder, dtype) if folder.is_dir() else None
    except FastdiffError:
        return None  # loading says what is wrong


def _share(device: torch.device) -> float:
    """Bytes for this rank: those of its GPU, or its part of what its machine has, asked before any rank loads."""
    own: tuple[str, float] = platform.node(), memory.free(device)
    if device.type != "cpu":
        return own[1]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    here = [have for node, have in told if node == own[0]]
    return min(here) / len(here)


def _instead(sizes: Sizes, method: ParallelMethod, ranks: int, have: float) -> str:
    """What would fit, in a few words."""

    def fits(room: Room) -> bool:
        return _SLACK * room.peak <= have

    def ways() -> Iterator[str]:
        shared = method.model_copy(update={"shard": "blocks"})
        helps = bool(sizes.blocks) and method.own_axis != "step" and method.leave is None
        if helps and not method.shard and fits(sizes.room(shared, ranks)):
            yield "parallel.shard = blocks"
        number = next((n for n in range(ranks + 1, _MOST + 1) if helps and fits(sizes.room(shared, n))), None)
        if number is not None:
            yield f"{number} devices with as much each, and parallel.shard = blocks"
        if fits(sizes.smaller().room(None, ranks)):
            yield _SMALLEST
        elif helps and fits(sizes.smaller().room(shared, ranks)):
            yield f"{_SMALLEST}, and parallel.shard = blocks"

    return f"what would fit is {' or '.join(ways()) or 'a device with more memory, or a smaller model'}"
