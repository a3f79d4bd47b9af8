"""Q-GESCO's curve: pictures drawn over ones that arrive with noise, by 8-bit models that were calibrated on clean
pictures, or on noisy ones. Adds to benchmarks/quant-corrupt.json.

    python scripts/measure_corrupt.py --model shapes-unet [--captions 32]

The paper's condition is a semantic map, sent over a noisy channel; that of the embedded models is the picture that
img2img draws over. Caption k of the held-out split draws over the picture of its own scene with seed k; at each
variance of the noise (of values between 0 and 1) all rows are given the same noise. `psnr` is to what the float model
makes of the same noisy picture. Ranges are calibrated on training scenes, clean or by `corrupt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure_cachequant import FOLDER, keep
from PIL import Image

import fastdiff
from fastdiff.bench import checker, metrics
from fastdiff.bench.measure import to_bytes
from fastdiff.bench.scenes import Scene, render, scenes
from fastdiff.config import Config
from fastdiff.pipelines.conditions import VARIANCES
from fastdiff.pipelines.inputs import fitting
from fastdiff.pipelines.ranges import calibrate_ranges

STEPS = {"shapes-dit": 28, "shapes-unet": 50}
STATIC: dict[str, Any] = {"method": "w8a8", "speed": "smallest"}


def arrived(scene: Scene, variance: float, seed: int) -> Image.Image:
    """A scene's picture with Gaussian noise, as `corrupt` mixes it in."""
    noise = np.random.default_rng(seed).standard_normal((64, 64, 3)) * variance**0.5
    return Image.fromarray(((render(scene) / 255 + noise).clip(0, 1) * 255).round().astype(np.uint8))


def drawn(pipe: Any, asked: list[Scene], variance: float, call: dict[str, Any], batch: int = 8) -> np.ndarray:
    found = []
    for start in range(0, len(asked), batch):
        some, seeds = asked[start : start + batch], range(start, min(start + batch, len(asked)))
        pictures = [arrived(scene, variance, seed) for scene, seed in zip(some, seeds, strict=True)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        texts = [scene.caption for scene in some]
        found.append(pipe(texts, image=pictures, generator=generators, output_type="np", **call).images)
    return np.concatenate(found)


def main(
    model: Annotated[str, typer.Option(help="shapes-unet or shapes-dit")] = "shapes-unet",
    captions: Annotated[int, typer.Option(min=1, help="held-out captions, a picture each")] = 32,
    fit: Annotated[int, typer.Option(min=2, help="training scenes to calibrate on")] = 16,
    strength: Annotated[float, typer.Option(help="how much is drawn over")] = 0.6,
    variance: Annotated[list[float] | None, typer.Option(help="only these levels of noise")] = None,
) -> None:
    """Measure, print and write all rows of a model."""
    torch.set_num_threads(1)
    pipe = fitting(fastdiff.load(model), ("image",))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": STEPS[model], "guidance_scale": 3.0, "strength": strength}
    asked, taught = scenes(0, captions, held_out=True), scenes(0, fit, held_out=False)
    shown = {"image": [Image.fromarray(render(scene)) for scene in taught]}
    configs = {"float": Config()}
    for name, more in (("calibrated on clean pictures", {}), ("calibrated with corrupt", {"corrupt": True})):
        ranges = Path("build") / f"ranges-{model}-{len(configs)}.safetensors"
        ranges.parent.mkdir(exist_ok=True)
        texts = [scene.caption for scene in taught]
        calibrate_ranges(pipe, Config(quant=STATIC).quant, texts, batch=8, **call, **shown, **more).save(ranges)
        configs[f"w8a8, {name}"] = Config(quant=STATIC | {"ranges": str(ranges)})
    configs["w8a8, ranges at each call"] = Config(quant=STATIC)
    for level in variance or (0.0, *VARIANCES[1::2]):
        truth = None
        for name, config in configs.items():
            with fastdiff.accelerate(pipe, config):
                images = drawn(pipe, asked, level, call)
            truth = images if truth is None else truth
            marks = [checker.mark(image, scene) for image, scene in zip(to_bytes(images), asked, strict=True)]
            near = metrics.psnr(images, truth)
            row = {"model": model, "name": f"{name}, variance {level:g}", "variance": level, "captions": captions}
            row |= {"steps": STEPS[model], "strength": strength, "psnr": round(float(near.mean()), 2)}
            row |= {"psnr_least": round(float(near.min()), 2)}
            row["prompt_accuracy"] = round(checker.summary(marks)["prompt_accuracy"], 4)
            keep(FOLDER / "quant-corrupt.json", row, pipe)
    print(json.dumps({"written": "benchmarks/quant-corrupt.json"}))


if __name__ == "__main__":
    typer.run(main)
