"""What the card can do by itself: copies, matrix products, launches, waits for a communicator."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator

import torch
from torch import distributed

from fastdiff.machine import cpu_name, package_version

from .bench import Bench, Row, tried

PACKAGES = ("torch", "triton", "diffusers", "transformers", "cache-dit", "torchao")


def card(bench: Bench) -> Iterator[Row]:
    yield {"name": "versions", **{name: package_version(name) for name in PACKAGES}, "cpu": cpu_name()}
    if bench.device.type == "cuda":
        told = torch.cuda.get_device_properties(bench.device)
        capability, memory = f"{told.major}.{told.minor}", round(told.total_memory / 1e9, 1)
        cuda = torch.version.cuda
        yield {"name": "card", "card": told.name, "capability": capability, "memory_gb": memory, "cuda": cuda}
    yield tried("copy", lambda: _copy(bench))
    size = 128 if bench.dry else 8192
    for kind, call in _products(bench, size).items():
        yield tried(f"product {kind} {size}", lambda call=call: _rate(bench, call, size))  # type: ignore[misc]
    yield tried("launch", lambda: _launch(bench))


def _copy(bench: Bench) -> Row:
    source = torch.empty(1 << (16 if bench.dry else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return {"gb_s": round(2 * source.numel() / bench.seconds(lambda: target.copy_(source)) / 1e9, 1)}


def _products(bench: Bench, size: int) -> dict[str, Callable[[], torch.Tensor]]:
    a = torch.randn(size, size, device=bench.device)
    one = torch.ones(size, 1, device=bench.device)
    half, eight = a.to(torch.bfloat16), (a * 40).clamp(-127, 127).to(torch.int8)
    small = a.to(torch.float8_e4m3fn)
    return {
        "bf16": lambda: half @ half.t(),
        "int8": lambda: torch._int_mm(eight, eight.t()),
        "fp8": lambda: torch._scaled_mm(
            small, small.t(), one, one.t().contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }


def _rate(bench: Bench, call: Callable[[], torch.Tensor], size: int) -> Row:
    return {"tera_operations_s": round(2 * size**3 / bench.seconds(call, 0.02) / 1e12, 1)}


def _launch(bench: Bench) -> Row:
    x = torch.zeros(8, device=bench.device)
    bench.wait()
    began = time.perf_counter()
    for _ in range(1000):
        x.add_(1)
    host = time.perf_counter() - began
    bench.wait()
    return {"host_us": round(1e3 * host, 2)}


def waits(bench: Bench) -> Iterator[Row]:
    """50 ms of work before an exchange: how long the host stands still, with a plain wait and with a time-out."""
    if bench.device.type != "cuda":
        yield {"name": "NCCL", "skipped": "needs a card"}
        return
    yield tried("NCCL", lambda: _nccl(bench))


def _nccl(bench: Bench) -> Row:
    torch.cuda.set_device(bench.device)
    distributed.init_process_group(
        "nccl", store=distributed.HashStore(), rank=0, world_size=1, device_id=bench.device
    )  # fmt: skip
    try:
        x = torch.ones(1024, device=bench.device)
        into = [torch.empty_like(x)]
        distributed.all_gather(into, x)
        row: Row = {}
        for name, told in (("plain", ()), ("timeout", (datetime.timedelta(seconds=30),))):
            bench.wait()
            torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
            work = distributed.all_gather(into, x, async_op=True)
            began = time.perf_counter()
            work.wait(*told)
            row[f"{name}_host_ms"] = round(1e3 * (time.perf_counter() - began), 2)
        return row
    finally:
        distributed.destroy_process_group()
