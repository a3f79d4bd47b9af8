"""Where block-sparse attention pays on a CPU, and what it costs in quality; writes benchmarks/sparse-attention.json.

    python scripts/measure_sparse.py [--captions 8]

Speed: random queries, keys and values (which blocks are kept does not change the work), one thread, CPU seconds of one
call, dense and sparse in turns, the choice of blocks included. Quality: shapes-dit, whose attention is far too short
for this to pay, with the least length lowered for it; PSNR to the dense images of the same seeds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure_cachequant import Study
from torch import Tensor

import fastdiff
from fastdiff.attention import Attention
from fastdiff.bench import metrics
from fastdiff.bench.measure import draw
from fastdiff.bench.row import command, environment
from fastdiff.config import Config
from fastdiff.pipelines.sparse.blocks import attend_blocks
from fastdiff.pipelines.sparse.radial import radial
from fastdiff.pipelines.sparse.sparge import sparge

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "sparse-attention.json"
HEADS, CHANNELS, FRAMES = 2, 64, 16
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
KEEP = (0.1, 0.25, 0.5, 0.75)
DECAY = (0.95, 0.2)
QUALITY: dict[str, dict[str, Any]] = {
    **{f"sparge, keep {keep:g}": {"sparse": "sparge", "keep": keep} for keep in (0.75, 0.5, 0.25)},
    "sparge, keep 0.5, chosen every 4 steps": {"sparse": "sparge", "keep": 0.5, "interval": 4},
    "sparge, keep 0.5, 25 % of the steps dense": {"sparse": "sparge", "keep": 0.5, "warmup_steps": 7},
    "sparge, mass 0.9": {"sparse": "sparge", "mass": 0.9},
    "sparge, mass 0.7": {"sparse": "sparge", "mass": 0.7},
}


def main(
    captions: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=3, help="turns of dense and sparse")] = 3,
    block: Annotated[int, typer.Option(min=1, help="tokens in a block of the quality rows")] = 8,
) -> None:
    """Measure, print and write everything."""
    torch.set_num_threads(1)
    speed = [row for tokens in LENGTHS for row in _speed(tokens, rounds)]
    study = Study("shapes-dit", 28, captions, captions, 0)
    quality = [_quality(study, name, settings, block) for name, settings in QUALITY.items()]
    pays = {keep: _pays(speed, keep) for keep in KEEP}
    written = {
        "command": command(), "environment": environment(study.pipe), "pays_from_tokens": pays,
        "speed": speed, "quality": quality,
    }  # fmt: skip
    OUTPUT.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(pays))


def _speed(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one length: each way to choose, against dense attention in turns."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, tokens, CHANNELS, generator=generator) for _ in range(3))
    whole = (0, tokens)
    ways: dict[str, Callable[[], Tensor]] = {}
    for keep in KEEP:
        how = Attention(sparse="sparge", keep=keep)
        ways[f"sparge, keep {keep:g}"] = lambda how=how: sparge(query, key, whole, how, None)  # type: ignore[misc]
    block = how.block
    for decay in DECAY:
        ways[f"radial, decay {decay:g}, {FRAMES} frames"] = lambda decay=decay: radial(  # type: ignore[misc]
            tokens, whole, FRAMES, block, decay, query.device
        )
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first warms up
        for name, choose in ways.items():
            begun = time.process_time()
            F.scaled_dot_product_attention(query, key, value)
            dense = time.process_time()
            kept = choose()
            chosen = time.process_time()
            attend_blocks(query, key, value, kept, block)
            seconds[name].append((dense - begun, chosen - dense, time.process_time() - chosen))
    return [_speed_row(tokens, name, seconds[name][1:], choose()) for name, choose in ways.items()]


def _speed_row(tokens: int, name: str, seconds: list[tuple[float, float, float]], kept: Tensor) -> dict[str, Any]:
    ratios = [dense / (choice + sparse) for dense, choice, sparse in seconds]
    dense, choice, sparse = (statistics.median(column) for column in zip(*seconds, strict=True))
    row = {
        "tokens": tokens, "name": name, "heads": HEADS, "channels": CHANNELS, "block": Attention().block,
        "density": round(float(kept.float().mean()), 4), "rounds": len(seconds),
        "dense_s": round(dense, 5), "choice_s": round(choice, 5), "sparse_s": round(sparse, 5),
        "speedup": round(statistics.median(ratios), 3), "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def _pays(rows: list[dict[str, Any]], keep: float) -> int | None:
    """The least measured length from which on every round was faster than dense; None if there is none."""
    own = sorted((row["tokens"], row["speedup_range"][0]) for row in rows if row["name"] == f"sparge, keep {keep:g}")
    slow = [tokens for tokens, least in own if least <= 1]
    return next((tokens for tokens, _ in own if tokens > max(slow, default=0)), None)


def _quality(study: Study, name: str, settings: dict[str, Any], block: int) -> dict[str, Any]:
    config = Config(attention=Attention(**settings, block=block, min_tokens=1))
    captions, seeds = [scene.caption for scene in study.asked], list(range(len(study.asked)))
    begun = time.process_time()
    with fastdiff.accelerate(study.pipe, config) as handle:
        images = draw(study.pipe, captions, seeds, study.steps, 3.0)
        told = handle.report.attention["transformer"]
    seconds = (time.process_time() - begun) / len(captions)
    row = {
        "model": study.model, "name": name, "steps": study.steps, "captions": len(captions), "block": block,
        "psnr": round(float(metrics.psnr(images, study.truth).mean()), 2),
        "density": round(told["density"], 4), "sparse_calls": told["sparse"], "dense_calls": told["dense"],
        "cpu_seconds_per_image": round(seconds, 3),
        "dense_cpu_seconds_per_image": study.baseline["cpu_seconds_per_image"],
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    typer.run(main)
