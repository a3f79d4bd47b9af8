"""Switching between the float denoiser and a copy in 4 bits; writes benchmarks/switch.json.

    python scripts/measure_switch.py --model shapes-dit [--captions 16]

Image k has caption k of the held-out split and seed k; PSNR is to the float images of the same seeds. A second
denoiser in 4 bits saves memory traffic, not multiply-adds: what it costs in quality is the question here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure_cachequant import Study

import fastdiff
from fastdiff.bench import metrics
from fastdiff.bench.row import command, environment
from fastdiff.config import Config
from fastdiff.pipelines.families import anatomies

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "switch.json"
STEPS = {"shapes-dit": 28, "shapes-unet": 50}
SPANS = {"all": (0.0, 1.0), "first half": (0.0, 0.5), "last half": (0.5, 1.0), "last quarter": (0.75, 1.0)}


def main(
    model: Annotated[str, typer.Option()] = "shapes-dit",
    captions: Annotated[int, typer.Option(min=1)] = 16,
    batch: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Measure, print and write all rows of a model, in the place of its older ones."""
    torch.set_num_threads(1)
    study = Study(model, STEPS[model], captions, batch, 0)
    rows: list[dict[str, Any]] = []
    second = _quantized(study.pipe, {"method": "w4a16", "speed": "smallest"})
    for where, between in SPANS.items():
        cache = {"method": "switch", "second": second, "between": between}
        images, told = study.images(Config(cache=cache))  # operations are counted in the pipeline's own denoiser alone
        psnr = round(float(metrics.psnr(images, study.truth).mean()), 2)
        found = {"model": model, "name": f"w4a16, {where}", "captions": captions, "steps": study.steps}
        rows.append(found | {"between": between, "psnr": psnr, "own_steps": told["computed_steps"]})
        print(json.dumps(rows[-1]), flush=True)
    known = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"] if OUTPUT.exists() else []
    kept = [row for row in known if row["model"] != model]
    written = {"command": command(), "environment": environment(study.pipe), "rows": [*kept, *rows]}
    OUTPUT.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _quantized(pipe: Any, quant: dict[str, Any]) -> torch.nn.Module:
    """A copy of the pipeline's denoiser, quantized for good."""
    twin, component = copy.copy(pipe), anatomies(pipe)[0].component
    setattr(twin, component, copy.deepcopy(getattr(pipe, component)))
    fastdiff.quantize(twin, {"quant": quant})
    found: torch.nn.Module = getattr(twin, component)
    return found


if __name__ == "__main__":
    typer.run(main)
