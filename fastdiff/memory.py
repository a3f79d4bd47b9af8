"""How much memory there is to be had: of a GPU, or of this machine within the limits of its control groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path("/")  # below which proc and sys are
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # version 2, 1
_CACHED = ("inactive_file", "total_inactive_file")  # counted as used, and given back when somebody wants it


def free(device: torch.device, root: Path = ROOT) -> float:
    """Bytes that new tensors may take: infinite where nobody tells, as on a CPU without Linux."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type != "cpu":
        return math.inf
    found = [left for folder in _groups(root) if (left := _left(folder)) is not None]
    with suppress(OSError, KeyError):
        found.append(_table(root / "proc/meminfo")["MemAvailable:"] * 1024)
    return min(found, default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """The directories of this process's control groups of memory, each with those above it, which bind it as well."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                top = root / "sys/fs/cgroup" / kinds
                own = top / path.strip("/")
                yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _left(folder: Path) -> float | None:
    """What a group may still take; None where it has no limit, or is not there."""
    for most, present in _LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in (most, present))
            stat = _table(folder / "memory.stat")
            return limit - used + next((stat[name] for name in reversed(_CACHED) if name in stat), 0)
    return None


def _table(file: Path) -> dict[str, int]:
    rows = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {name: int(value) for name, value, *_ in rows}
