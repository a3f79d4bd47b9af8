"""Whether w8a8 is slower than float on the embedded models; writes benchmarks/quant-clock.json.

    python scripts/measure_quant_clock.py

Rounds of float, plain and accelerated without any lever (which is what choosing has to be compared with), w8a8 as the
clock chooses its layers, and w8a8 in all layers, interleaved in one process; CPU seconds of a picture, one thread.
`timed` is what the report said of the clock's choice.
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
from fastdiff import output
from fastdiff.machine import cpu_name, package_version

FILE = Path(__file__).parents[1] / "benchmarks/quant-clock.json"
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "float": {},
    "w8a8, never slower": {"method": "w8a8"},
    "w8a8, all layers": {"method": "w8a8", "speed": "smallest"},
}
_CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}


def drawn(pipe: Any, seed: int) -> float:
    """CPU seconds of a picture."""
    begun = time.process_time()
    pipe("a small green ring", generator=torch.Generator().manual_seed(seed), **_CALL)
    return time.process_time() - begun


def measured(model: str, rounds: int) -> dict[str, object]:
    """One pipeline each, so that none is installed anew between its rounds."""
    pipes: dict[str, Any] = {}
    said: list[str] = []
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for name, quant in CONTENDERS.items():
        pipes[name] = fastdiff.load(model)
        pipes[name].set_progress_bar_config(disable=True)
        handle = None if quant is None else fastdiff.accelerate(pipes[name], {"quant": quant} if quant else None)
        first = drawn(pipes[name], 0)
        if handle is not None:
            said += [f"{name}: {note}" for note in handle.report.notes if "timed" in note]
            said.append(f"{name}: first picture {first:.2f} s, choosing included")
    for k in range(rounds):
        for name in CONTENDERS:
            seconds[name].append(drawn(pipes[name], k))
    times = {
        name: sorted(plain / own for plain, own in zip(seconds["float"], taken, strict=True))
        for name, taken in seconds.items()
    }
    return {
        "seconds": {name: round(statistics.median(taken), 4) for name, taken in seconds.items()},
        "times_as_fast": {
            name: [round(found, 3) for found in (statistics.median(t), t[0], t[-1])] for name, t in times.items()
        },
        "timed": said,
    }


def main(rounds: Annotated[int, typer.Option(min=3)] = 15) -> None:
    torch.set_num_threads(1)
    found = {
        "what": "times as fast as float: median, least and most of interleaved rounds; CPU seconds of 4 steps",
        "machine": cpu_name(), "threads": 1, "rounds": rounds,
        "versions": {name: package_version(name) for name in ("torch", "diffusers")},
        "models": {model: measured(model, rounds) for model in ("shapes-unet", "shapes-dit")},
    }  # fmt: skip
    output.write(FILE, lambda part: part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))
    typer.echo(FILE)


if __name__ == "__main__":
    typer.run(main)
