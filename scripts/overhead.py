"""What does `accelerate` cost when nothing is enabled? Pairs of calls, plain and patched, in turns.

python scripts/overhead.py --json benchmarks/overhead.json
"""

from __future__ import annotations

import json as jsonlib
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.pipelines.loading import embedded


def main(
    json: Annotated[Path | None, typer.Option(help="write the result here; it is printed too")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="pairs of calls a model")] = 40,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    output.check([json], overwrite)
    torch.set_num_threads(1)
    results = [_measured(name, rounds, steps) for name in embedded()]
    text = jsonlib.dumps([{**result, "command": command()} for result in results], indent=2)
    if json is not None:
        output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


def _measured(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Ratios of patched over plain CPU seconds, pair by pair; the order within a pair alternates."""
    pipe = fastdiff.load(name)
    pipe.set_progress_bar_config(disable=True)

    def call() -> tuple[float, np.ndarray]:
        began = time.process_time()
        images = pipe(
            "a large red circle above a small blue square",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images
        return time.process_time() - began, images

    def patched() -> tuple[float, np.ndarray]:
        with fastdiff.accelerate(pipe):
            return call()

    call()
    ratios, same = [], True
    for number in range(rounds):
        first, second = (call, patched) if number % 2 else (patched, call)
        (a, one), (b, two) = first(), second()
        ratios.append(b / a if number % 2 else a / b)
        same = same and bool(np.array_equal(one, two))
    quarter, half, three = (float(np.percentile(ratios, q)) for q in (25, 50, 75))
    return {
        "model": name,
        "steps": steps,
        "pairs": rounds,
        "ratio_median": round(half, 4),
        "ratio_quartiles": [round(quarter, 4), round(three, 4)],
        "ratio_mean": round(statistics.fmean(ratios), 4),
        "identical": same,
        "environment": environment(pipe),
    }


if __name__ == "__main__":
    typer.run(main)
