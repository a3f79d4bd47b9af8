"""What costs no bit: seconds of a whole call with each part of the preset `lossless`, and whether bits are the same.

python scripts/measure_exact.py -o benchmarks/exact.json    about 5 minutes on one core
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.bench.row import command, environment
from fastdiff.pipelines.loading import call_defaults

ROWS: dict[str, Any] = {
    "plain": {},
    "text.keys": {"text": {"keys": True}},
    "text.cache, a new prompt": {"text": {"cache": True}},
    "text.cache, a prompt of before": {"text": {"cache": True}},
    "lossless, a prompt of before": "lossless",
    "channels_last (no setting of fastdiff)": {},
}
BEFORE = "a prompt of before"


def lay_out(pipe: Any, form: torch.memory_format) -> None:
    for part in ("unet", "transformer", "vae"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).to(memory_format=form)


def drawn(pipe: Any, prompt: str) -> tuple[float, np.ndarray]:
    """Seconds of a whole call, and its picture."""
    began = time.perf_counter()
    call = call_defaults(pipe) | {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    picture = pipe(prompt, **call).images
    return time.perf_counter() - began, picture


def measured(pipe: Any, model: str, rounds: int) -> list[dict[str, Any]]:
    """All rows in turn, `rounds` times, each time with another prompt."""
    pipe.set_progress_bar_config(disable=True)
    warm, *prompts = prompts_for(pipe, rounds + 1, 0).texts
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    errors = dict.fromkeys(ROWS, 0.0)
    drawn(pipe, warm)
    for prompt in prompts:
        pictures = {}
        for name, config in ROWS.items():
            lay_out(pipe, torch.channels_last if name.startswith("channels_last") else torch.contiguous_format)
            with fastdiff.accelerate(pipe, config):
                drawn(pipe, prompt if name.endswith(BEFORE) else warm)
                taken, pictures[name] = drawn(pipe, prompt)
            seconds[name].append(taken)
            errors[name] = max(errors[name], float(np.abs(pictures[name] - pictures["plain"]).max()))
    lay_out(pipe, torch.contiguous_format)
    plain = seconds["plain"]
    ratios = {name: [a / b for a, b in zip(plain, found, strict=True)] for name, found in seconds.items()}
    return [
        {
            "model": model, "row": name, "seconds": round(statistics.median(found), 4),
            "speedup": round(statistics.median(ratios[name]), 3),
            "lowest": round(min(ratios[name]), 3), "highest": round(max(ratios[name]), 3),
            "same_bits": errors[name] == 0, "largest_difference": errors[name],
        }
        for name, found in seconds.items()
    ]  # fmt: skip


def main(output: Annotated[Path, typer.Option("-o")], rounds: int = 9, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    pipes = {model: fastdiff.load(model) for model in ("shapes-unet", "shapes-dit")}
    rows = [row for model, pipe in pipes.items() for row in measured(pipe, model, rounds)]
    where = environment(pipes["shapes-unet"])
    told = {"command": command(), "environment": where, "rounds": rounds, "threads": threads, "rows": rows}
    output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['model']:12} {row['row']:40} {row['seconds']:.3f} s  {row['speedup']:.3f}x  {row['same_bits']}")


if __name__ == "__main__":
    typer.run(main)
