"""Mark an embedded model: does it draw what captions say that it was never trained on?

    python scripts/evaluate_shapes.py --model shapes-unet --json unet.json --sheet unet.png

Image k has caption k of the held-out split and seed + k; scheduler, steps and guidance are the model's defaults.
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

import fastdiff
from fastdiff import output
from fastdiff.bench import Settings, checker, metrics
from fastdiff.bench.measure import draw, to_bytes
from fastdiff.bench.render import Tile, contact_sheet
from fastdiff.bench.row import command, environment, model_name
from fastdiff.bench.scenes import Scene, scenes
from fastdiff.errors import FastdiffError

_SHEET_IMAGES, _SHEET_COLUMNS = 64, 8


def main(
    model: Annotated[str, typer.Option(help="shapes-unet, shapes-dit, or a directory")],
    json: Annotated[Path | None, typer.Option(help="write the result here; it is printed too")] = None,
    sheet: Annotated[Path | None, typer.Option(help="write the first 64 images with their marks here")] = None,
    count: Annotated[int, typer.Option(min=1, help="held-out captions, one image each")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="default: the pipeline's (UNet 50, DiT 28)")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="default: the model's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the captions; image k has seed + k")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="images a call")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that exist")] = False,
) -> None:
    metrics.require_extra()
    output.check([json, sheet], overwrite)
    if threads is not None:
        torch.set_num_threads(threads)
    pipe = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    settings = Settings.of(pipe, steps, guidance_scale, seed=seed, batch=batch)
    asked = scenes(seed, count, held_out=True)
    began = time.perf_counter()
    images = _draw(pipe, asked, settings)
    seconds = (time.perf_counter() - began) / count
    marks = [checker.mark(image, scene) for image, scene in zip(images, asked, strict=True)]
    summary = {key: round(value, 4) for key, value in checker.summary(marks).items()}
    result = {
        "model": model_name(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "captions": count,
        "seed": seed,
        **{key: summary.pop(key) for key in ("prompt_accuracy", "all_correct")},
        "slots": summary,
        "seconds_per_image": round(seconds, 3),
        "batch": batch,
        "environment": environment(pipe),
        "command": command(),
    }
    text = jsonlib.dumps(result, indent=2, allow_nan=False)
    if json is not None:
        output.write(json, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    if sheet is not None:
        tiles = [_tile(*shown) for shown in zip(images, asked, marks, strict=True)]
        output.write(sheet, contact_sheet(tiles[:_SHEET_IMAGES], _SHEET_COLUMNS).save)
    print(text)


def _draw(pipe: Any, asked: list[Scene], settings: Settings) -> np.ndarray:
    starts = range(0, len(asked), settings.batch)
    found = []
    for start in track(starts, "drawing", console=Console(stderr=True)):
        some = asked[start : start + settings.batch]
        seeds = [settings.seed + start + k for k in range(len(some))]
        images = draw(pipe, [s.caption for s in some], seeds, settings.steps, settings.guidance_scale)
        found.append(to_bytes(images))
    return np.concatenate(found)


def _tile(image: np.ndarray, scene: Scene, mark: checker.Mark) -> Tile:
    wrong = [kind for kind, asked in mark.asked.items() if mark.right[kind] < asked]
    if not wrong:
        return Tile(image, f"✓ {scene.caption}", "darkgreen")
    return Tile(image, f"✗ {scene.caption} [{', '.join(wrong)}]", "darkred")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FastdiffError as error:
        sys.exit(f"error: {error}")
