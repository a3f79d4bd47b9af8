"""Which rank does what: one mesh of guidance branch x step x patch."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastdiff.errors import BackendUnavailable, BadConfig


@dataclass(frozen=True)
class Topology:
    """The place of this rank in a mesh of sizes `cfg`, `step` and `patch`, the last axis running fastest."""

    cfg: int
    step: int
    patch: int
    rank: int

    @property
    def size(self) -> int:
        return self.cfg * self.step * self.patch

    def place(self, axis: str) -> int:
        """Where this rank is on one axis."""
        return self.rank // self._stride(axis) % getattr(self, axis)

    def group(self, axis: str) -> list[int]:
        """The ranks that differ from this one on one axis only, in order, this one among them."""
        stride = self._stride(axis)
        first = self.rank - self.place(axis) * stride
        return [first + k * stride for k in range(getattr(self, axis))]

    def _stride(self, axis: str) -> int:
        return {"cfg": self.step * self.patch, "step": self.patch, "patch": 1}[axis]


def own_device() -> None:
    """Under torchrun on GPUs each process of a machine takes another one, before a model is loaded."""
    if torch.cuda.is_available() and dist.is_available() and dist.is_torchelastic_launched():
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))


def card(device: torch.device) -> str:
    """Which of all GPUs a process computes on; nothing for what processes can share."""
    return f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def join(devices: int | None, device: torch.device, timeout: float) -> int:
    """Be one of `devices` processes, through the group that is there or the one that torchrun describes; the rank.
    None takes as many as there are.

    Raises BadConfig where this process is alone or the numbers differ, BackendUnavailable without a backend for the
    device.
    """
    alone = (
        "parallel needs several processes: set parallel.devices to 2 or more, or start them with torchrun"
        if devices in (None, 1)
        else f"parallel.devices = {devices}, but this is a single process; start {devices} with `fastdiff generate "
        f"--devices {devices}` or `torchrun --nproc-per-node {devices}`"
    )
    if not dist.is_available():
        raise BackendUnavailable("this torch was built without torch.distributed, which parallel needs")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        except ValueError:  # nobody set the environment of a rank
            raise BadConfig(alone) from None
        except RuntimeError as error:
            raise BackendUnavailable(f"the ranks could not meet: {str(error).splitlines()[0]}") from error
    world = dist.get_world_size()
    if world != (devices or max(world, 2)):
        raise BadConfig(
            alone if world == 1 else f"parallel.devices = {devices}, but {world} processes run; make the numbers equal"
        )
    return dist.get_rank()
