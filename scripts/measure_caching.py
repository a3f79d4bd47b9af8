"""Two claims about time, measured in interleaved rounds on shapes-unet; writes benchmarks/caching-time.json.

1. A cached step of deepcache costs what its computed part costs: the latency of a run against the time of the modules
   that ran, taken from a plain run with hooks.
2. faster_diffusion's batched decoding is faster than decoding step by step, and gives the same latents.

    python scripts/measure_caching.py [--rounds 9] [--threads 1]
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastdiff
from fastdiff.bench.row import command, environment
from fastdiff.caching.calibration import Stopwatch
from fastdiff.caching.unet import unet_inner
from fastdiff.pipelines.families import anatomies

STEPS = 50
OUTPUT = Path(__file__).parents[1] / "benchmarks" / "caching-time.json"


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Measure, print and write both claims."""
    torch.set_num_threads(threads)
    pipe = fastdiff.load("shapes-unet")
    pipe.set_progress_bar_config(disable=True)
    claims = [*(cost_of_a_cached_step(pipe, branch, rounds) for branch in (0, 2, 4)), batched_decoding(pipe, rounds)]
    found = {"command": command(), "environment": environment(pipe), "claims": claims}
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for claim in claims:
        print(json.dumps(claim))


def run(pipe: Any, **cache: Any) -> tuple[float, torch.Tensor]:
    """CPU seconds of the denoising and its latents: what other processes take is not counted."""
    with fastdiff.accelerate(pipe, cache=cache or None):
        call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
        begun = time.process_time()
        latents = pipe("a small green ring", generator=torch.Generator().manual_seed(0), **call)[0]
        return time.process_time() - begun, latents


def cost_of_a_cached_step(pipe: Any, branch: int, rounds: int) -> dict[str, Any]:
    settings = {"method": "deepcache", "interval": 3, "branch": branch}
    anatomy = anatomies(pipe)[0]
    inner, plain, cached = [], [], []
    run(pipe, **settings)
    for _ in range(rounds):
        watch, begun = Stopwatch(), time.perf_counter()
        with watch.on([unet_inner(anatomy, branch)]):
            run(pipe)
        inner.append(watch.seconds[f"inside skip {branch}"] / (time.perf_counter() - begun))
        plain.append(run(pipe)[0])
        cached.append(run(pipe, **settings)[0])
    left_out, computed = statistics.median(inner), len(range(0, STEPS, 3))
    expected = 1 - left_out * (STEPS - computed) / STEPS  # of the whole call: text encoder and solver always run
    ratios = [b / a for a, b in zip(plain, cached, strict=True)]
    measured = statistics.median(ratios)
    return {
        "claim": "deepcache costs what its computed part costs",
        "branch": branch, "computed_steps": computed, "steps": STEPS, "left_out_share": round(left_out, 4),
        "expected_latency_ratio": round(expected, 4), "measured_latency_ratio": round(measured, 4),
        "overhead": round(measured / expected - 1, 4), "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "rounds": rounds,
    }  # fmt: skip


def batched_decoding(pipe: Any, rounds: int) -> dict[str, Any]:
    serial = {"method": "faster_diffusion", "max_parallel": 1}
    sizes = (2, 4, 8)
    reference = run(pipe, **serial)[1]
    apart = {size: run(pipe, **serial | {"max_parallel": size})[1] for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in (1, *sizes)}
    for _ in range(rounds):
        for size, kept in seconds.items():
            kept.append(run(pipe, **serial | {"max_parallel": size})[0])
    ratios = {size: [a / b for a, b in zip(seconds[1], seconds[size], strict=True)] for size in sizes}
    return {
        "claim": "batched decoding is faster than serial decoding",
        "batch": 1, "rounds": rounds,
        "speedup_over_serial": {size: round(statistics.median(found), 4) for size, found in ratios.items()},
        "spread": {size: [round(min(found), 4), round(max(found), 4)] for size, found in ratios.items()},
        "largest_difference": {
            size: float((latents - reference).abs().max() / reference.abs().max()) for size, latents in apart.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
