"""What each rank checks, see tests/parallel/ranks.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import fastdiff
from fastdiff.pipelines.quantize import method_of
from fastdiff.pipelines.ranges import calibrate_ranges
from tests import tiny
from tests.quant.test_prune import PROMPTS, arguments


def static_ranges(rank: int, ranks: int) -> dict[str, float]:
    """How far a split picture is off the whole one, with static ranges and, in "dynamic", without.

    In float64, where sums in another order move nothing across the edge of a level: what is left is integers. In
    float32 a few levels differ by one (3e-5 of the latents).
    """
    found = {}
    for name in ("sd15", "sd3"):
        pipe, told = tiny.make(name).to(torch.float64), [str(Path(tempfile.mkdtemp()) / "ranges.safetensors")]
        dist.broadcast_object_list(told)  # all ranks must have the same config
        quant = {"method": "w8a8", "skip": ["down_blocks*"], "timestep_buckets": 2, "speed": "smallest"}
        if rank == 0:
            method = method_of(pipe, {"quant": quant})
            calibrate_ranges(pipe, method, PROMPTS, batch=2, **arguments(name)).save(Path(told[0]))
        dist.barrier()
        found[name] = split_off(pipe, name, {**quant, "ranges": told[0]}, ranks)
        if name != "sd3":  # whose ranges go by tokens
            found["dynamic"] = split_off(pipe, name, quant, ranks)
    return found


def split_off(pipe, name: str, quant: dict, ranks: int) -> float:
    call = {"height": 192, "steps": 3}
    with fastdiff.accelerate(pipe, quant=quant):
        whole = tiny.run(pipe, name, **call)
    with fastdiff.accelerate(pipe, quant=quant, parallel={"method": "patch", "devices": ranks}):
        split = tiny.run(pipe, name, **call)
    return float((split - whole).norm() / whole.norm())
