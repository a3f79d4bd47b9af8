"""What each rank checks, see tests/parallel/ranks.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch.distributed as dist

import fastdiff
from tests import tiny


def static_ranges(rank: int, ranks: int) -> dict:
    """With static ranges a split picture has the integers of the whole one; float sums differ in their order only."""
    from tests.quant.test_ranges import calibrated

    pipe, told = tiny.make("sd15_one_layer"), [str(Path(tempfile.mkdtemp()) / "ranges.safetensors")]
    dist.broadcast_object_list(told)  # all ranks must have the same config
    file = told[0]
    if rank == 0:
        calibrated(pipe).save(Path(file))
    dist.barrier()
    quant = {"method": "w8a8", "skip": ["down_blocks*"], "timestep_buckets": 2, "ranges": file}
    call = {"height": 192, "steps": 3}
    with fastdiff.accelerate(pipe, quant=quant):
        whole = tiny.run(pipe, "sd15", **call)
    with fastdiff.accelerate(pipe, quant=quant, parallel={"method": "patch", "devices": ranks}):
        split = tiny.run(pipe, "sd15", **call)
    return {"off": float((split - whole).norm() / whole.norm())}
