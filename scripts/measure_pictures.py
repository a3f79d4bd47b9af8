"""Deciding for each picture of a batch, on shapes-dit or shapes-unet; writes benchmarks/batch-decisions.json.

    python scripts/measure_pictures.py --model shapes-dit [--captions 16]

Image k has caption k of the held-out split and seed k. For every dynamic method: pictures drawn alone, in a batch in
which each decides for itself, and in one in which the strictest decides for all. `apart` is the PSNR to the picture
drawn alone, its lowest; plain diffusers in the same batch is the first row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure_cachequant import Study

from fastdiff.bench import metrics
from fastdiff.bench.row import command, environment
from fastdiff.config import Config

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "batch-decisions.json"
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "shapes-dit": {
        "first_block": {"threshold": 0.16}, "dbcache": {"live_blocks": 1, "threshold": 0.16, "warmup_steps": 4},
        "teacache": {}, "easycache": {}, "seacache": {"threshold": 0.5},
    },
    "shapes-unet": {"easycache": {}, "seacache": {}},
}  # fmt: skip
STEPS = {"shapes-dit": 28, "shapes-unet": 50}


def main(
    model: Annotated[str, typer.Option()] = "shapes-dit",
    captions: Annotated[int, typer.Option(min=1)] = 16,
    batch: Annotated[int, typer.Option(min=2)] = 8,
) -> None:
    """Measure, print and write all rows of a model, in the place of its older ones."""
    torch.set_num_threads(1)
    study = Study(model, STEPS[model], captions, batch, 0)
    rows: list[dict[str, Any]] = []

    def add(name: str, config: Config, size: int, alone: np.ndarray | None) -> np.ndarray:
        study.batch = size
        images, told = study.images(config)
        near = None if alone is None else round(float(metrics.psnr(images, alone).min()), 1)
        found = {"model": model, "name": name, "batch": size, "captions": captions, "steps": study.steps}
        rows.append(found | {"psnr": round(float(metrics.psnr(images, study.truth).mean()), 2), "apart": near} | told)
        print(json.dumps(rows[-1]), flush=True)
        return images

    plain = add("plain", Config(), 1, None)
    add("plain", Config(), batch, plain)
    for method, settings in METHODS[model].items():
        of = {"method": method, **settings}
        alone = add(f"{method} alone", Config(cache=of), 1, None)
        for pictures in ("each", "strictest"):
            add(f"{method} {pictures}", Config(cache={**of, "pictures": pictures}), batch, alone)
    known = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"] if OUTPUT.exists() else []
    found = {"command": command(), "environment": environment(study.pipe)}
    found["rows"] = [row for row in known if row["model"] != model] + rows
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
