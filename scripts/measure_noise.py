"""Do caches that extrapolate amplify the noise of quantized activations? Writes benchmarks/quant-noise.json.

    python scripts/measure_noise.py --model shapes-dit     # adds the rows of a model

Each cache is drawn with float weights and with quantized ones. What quantization changes with the cache, as a part of
what it changes without one (mean square error of pictures), is its amplification; its share is that of the square
error to the float picture of all steps that it makes. The squares add up where the two have nothing in common.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from measure_cachequant import Study  # beside this file
from numpy.typing import NDArray

from fastdiff import output
from fastdiff.bench.metrics import psnr
from fastdiff.bench.row import command, environment
from fastdiff.config import Config

FILE = Path(__file__).parents[1] / "benchmarks/quant-noise.json"
STEPS = {"shapes-unet": 50, "shapes-dit": 28}
SCHEMES = ("w8a8", "fp8", "w4a8")
CACHES: dict[str, dict[str, Any] | None] = {
    "every step": None,
    **{
        f"{name}, every {place} step": {"method": "ab_cache", "interval": interval, "order": order}
        for interval, place in ((2, "2nd"), (4, "4th"))
        for order, name in ((1, "reuse"), (2, "line"), (3, "parabola"), (4, "cubic"))
    },
}


def main(
    model: Annotated[str, typer.Option()] = "shapes-dit",
    captions: Annotated[int, typer.Option()] = 24,
    batch: Annotated[int, typer.Option()] = 8,
) -> None:
    study = Study(model, STEPS[model], captions, batch, 0)
    floats = {name: study.images(Config(cache=cache))[0] for name, cache in CACHES.items()}
    rows = [] if not FILE.exists() else json.loads(FILE.read_text(encoding="utf-8"))
    rows = [row for row in rows if row["model"] != model]
    for scheme in SCHEMES:
        alone = None
        for name, cache in CACHES.items():
            config = Config(cache=cache, quant={"method": scheme, "speed": "smallest"})
            found, told = study.images(config)
            noise = square(found, floats[name])
            alone = noise if alone is None else alone
            rows.append({
                "model": model, "scheme": scheme, "name": name, "steps": STEPS[model], "captions": captions,
                "computed_steps": told["computed_steps"], "psnr": decibels(found, study.truth),
                "psnr_of_cache": decibels(floats[name], study.truth), "amplification": round(noise / alone, 3),
                "share": round(noise / square(found, study.truth), 3),
                "command": command(), "environment": environment(study.pipe),
            })  # fmt: skip
            print({key: value for key, value in rows[-1].items() if key != "environment"}, flush=True)
    output.write(FILE, lambda part: part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8"))


def square(one: NDArray, other: NDArray) -> float:
    return float(np.mean((one.astype(np.float64) - other) ** 2))


def decibels(one: NDArray, other: NDArray) -> float:
    """The mean over pictures; 120 where they are the same."""
    return round(float(psnr(one, other).mean()), 2)


if __name__ == "__main__":
    typer.run(main)
