"""What it brings that some layers of a displaced method wait, by the bytes they wait for: real processes over gloo.

Layers are chosen by `fastdiff.pipelines.freshness` on training captions, and pictures of held-out ones are compared
with one device's. Beside them: the last steps synchronous, and as many bytes spent on the first or the last layers, as
DICE lists them. Rows are written one by one; those that the file has are kept.

    python scripts/measure_freshness.py [--model shapes-unet] [--ranks 2] [--count 4]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure_parallel import GUIDANCE, STEPS, TIMEOUT, alone, drawn, keep, known, quality, setting, traffic

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.config import Config
from fastdiff.parallel.waiting import LayerPlan, chosen
from fastdiff.pipelines.freshness import calibrate_layers
from fastdiff.studio.ranks import launch

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-freshness.json"
PROMPTS = 4
SHARES = (0.02, 0.1, 0.3)  # of the bytes that all layers would wait for
Row = dict[str, Any]


def wanted(model: str, ranks: int, plan: LayerPlan) -> Iterator[Row]:
    every = sum(size for _, size in plan.table.values())

    def row(name: str, layers: Sequence[str] = (), **more: Any) -> Row:
        sent = sum(plan.table[layer][1] for layer in layers)
        settings = {"method": "distrifusion", "devices": ranks, "sync_layers": list(layers), **more}
        told = {"waiting_layers": len(layers), "all_layers": len(plan.table), "waiting_bytes": sent, "all_bytes": every}
        return {"model": model, "ranks": ranks, "name": name} | told | {"parallel": settings}

    yield row("no layer waits")
    yield row("cool-down 5", cooldown_steps=5)
    for share in SHARES:
        layers = chosen(plan.table, int(share * every))
        yield row(f"chosen, {share:.0%} of the bytes", layers)
    within = int(SHARES[1] * every)
    yield row(f"first layers, {SHARES[1]:.0%} of the bytes", _fitting(plan, list(plan.table), within))
    yield row(f"last layers, {SHARES[1]:.0%} of the bytes", _fitting(plan, list(plan.table)[::-1], within))


def _fitting(plan: LayerPlan, order: Sequence[str], budget: int) -> list[str]:
    found: list[str] = []
    for name in order:
        if (size := plan.table[name][1]) <= budget:
            found.append(name)
            budget -= size
    return found


def together(model: str, ranks: int, count: int, file: Path, reference: Path) -> None:
    """Calibration and all rows, in each rank; rank 0 compares and writes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    first, whole, prompts = dist.get_rank() == 0, np.load(reference), prompts_for(pipe, count, 0)
    config = Config(parallel={"method": "distrifusion", "devices": ranks, "sync_kb": 1e9, "timeout": TIMEOUT})
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "batch": PROMPTS}
    texts = prompts_for(pipe, PROMPTS, 0, held_out=False).texts
    plan: LayerPlan = calibrate_layers(pipe, config, texts, **call).parallel.plan  # type: ignore[union-attr]
    for row in wanted(model, ranks, plan):
        if known(file, row):
            continue
        with fastdiff.accelerate(pipe, parallel=row["parallel"] | {"timeout": TIMEOUT}) as fast:
            told = list(drawn(pipe, prompts, count, handle=fast, latent=not first))
        if first:
            found = quality(np.concatenate([images for images, _ in told]), whole, prompts)
            found |= traffic([report for _, report in told], count)
            keep(file, row | found, setting(pipe, count, count) | {"calibrated_on": f"{PROMPTS} training captions"})
            print(row["model"], ranks, row["name"], row["waiting_bytes"], found["psnr"], flush=True)
        dist.barrier()  # the others read the file, too


def main(
    model: Annotated[list[str] | None, typer.Option(help="Embedded models; both by default.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of processes; 2 and 4 by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions, in one call.")] = 4,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows are, and go.")] = OUTPUT,
) -> None:
    """Measure what the file does not hold yet."""
    torch.set_num_threads(1)
    for number, name in product(ranks or (2, 4), model or ("shapes-unet", "shapes-dit")):
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "plain.npy"
            alone(name, count, count, file, reference, rivals=False)
            if code := launch(number, TIMEOUT, together, name, number, count, file, reference):
                raise SystemExit(code)


if __name__ == "__main__":
    typer.run(main)
