"""Normal levels of 2, 3 and 4 bits (HIGGS): how far errors of layers sum up, and pictures with them among mixed bits.

    python scripts/measure_grids.py --model shapes-unet [--captions 16]    # adds to benchmarks/quant-grids.json

Rows "sum": all layers in the same bits. `predicted` is the root of the summed errors of the layers, each quantized
alone, `measured` that of all at once, both relative errors of the denoiser's output on the same calls; `ratio` is
measured over predicted, squared: 1 where the linear model holds. `half` has every other layer quantized.
Rows of pictures: image k with held-out caption k and seed k, against the float images of the same seeds; plans are made
on other captions. Rows are written as they are measured, in the place of older ones of the same model and name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure_cachequant import Study, size_of

from fastdiff import output
from fastdiff.anatomy import fingerprint
from fastdiff.bench import metrics
from fastdiff.bench.row import command, environment
from fastdiff.config import Config
from fastdiff.pipelines.hearing import hear_each
from fastdiff.quant.allocate import Choice
from fastdiff.quant.build import layers_of
from fastdiff.quant.calls import Calls
from fastdiff.quant.schemes.mixed import BitPlan, Mixed
from fastdiff.quant.sensitivity import FORMAT, sensitivities, together

FILE = Path(__file__).parents[1] / "benchmarks" / "quant-grids.json"
GROUP, ROUNDING = 64, "mse"
ALL: tuple[Any, ...] = (4, 5, 8, "normal4", "normal3", "normal2")
UNIFORM: tuple[Any, ...] = (4, 5, 8)
SUMMED: tuple[Choice, ...] = (8, 4, "normal4", "normal3", "normal2")


def sums(calls: Calls, table: dict[str, dict[Choice, float]]) -> Iterator[dict[str, Any]]:
    """Predicted and measured error of all layers in the same bits, and of every other layer."""
    layers = {f.name: f for f in layers_of(calls.anatomy.denoiser) if f.name in table}
    for bits in SUMMED:
        row: dict[str, Any] = {"name": f"sum: {bits}"}
        for part, names in (("", list(layers)), ("half_", list(layers)[::2])):
            predicted = sum(table[name][bits] for name in names)
            some = {name: layers[name] for name in names}
            measured = together(calls, some, dict.fromkeys(names, bits), GROUP, ROUNDING)
            row |= {
                f"{part}layers": len(names), f"{part}predicted": round(math.sqrt(predicted), 5),
                f"{part}measured": round(math.sqrt(measured), 5), f"{part}ratio": round(measured / predicted, 3),
            }  # fmt: skip
        yield row


def pictures(study: Study, calls: Calls, table: dict[str, dict[Choice, float]]) -> Iterator[dict[str, Any]]:
    """The same normal levels for all, and plans at equal bytes with and without normal levels among the choices."""

    def row(name: str, choices: tuple[Any, ...], budget: float) -> dict[str, Any]:
        plan = Mixed(choices=choices, plan=known, budget_mb=budget).planned(calls)
        config = Config(quant={"method": "mixed", "plan": plan, "speed": "smallest"})
        return study.row(name, config, {
            "denoiser_mb": round(size_of(study, config) / 1e6, 4), "predicted": round(plan.predicted**0.5, 5),
            "measured": round(plan.measured**0.5, 5), "ratio": round(plan.additivity, 3),
            "layers": {b: n for b in FORMAT if (n := sum(bits == b for bits in plan.bits.values()))},
        })  # fmt: skip

    known = BitPlan(
        denoiser=fingerprint(calls.anatomy), bits=dict.fromkeys(table, 8), bytes=0, predicted=0, measured=0, table=table
    )
    for name in ("normal4", "normal3", "normal2"):
        yield row(f"all: {name}", (name,), 1e6)
    size = size_of(study, Config(quant={"method": "w4a16", "group_size": 16, "speed": "smallest"})) / 1e6
    yield row("mixed: bytes of int4, groups of 16", UNIFORM, size)
    yield row("mixed with normal levels: bytes of int4, groups of 16", ALL, size)


def main(
    model: Annotated[str, typer.Option(help="shapes-unet or shapes-dit")] = "shapes-unet",
    steps: Annotated[int, typer.Option(min=2)] = 50,
    captions: Annotated[int, typer.Option(min=0, help="held-out captions, one image each; 0 draws none")] = 16,
    fit: Annotated[int, typer.Option(min=1, help="captions whose calls are measured, at four steps")] = 2,
    to: Annotated[Path, typer.Option()] = FILE,
) -> None:
    """Measure one model."""
    metrics.require_extra()
    torch.set_num_threads(1)
    study = Study(model, steps, max(1, captions), 8, fit)
    (calls,) = hear_each(study.pipe, study.prompts, batch=fit, **study.call).values()
    method = Mixed(budget_mb=1)
    layers = {f.name: f for f in layers_of(study.denoiser) if method.takes(f.name)}
    table = sensitivities(calls, layers, ALL if captions else SUMMED, GROUP, ROUNDING)
    rows = [sums(calls, table), *([pictures(study, calls, table)] if captions else [])]
    for row in (row for part in rows for row in part):
        row = {"model": model, "fit_captions": fit, **row, "command": command(), "environment": environment(study.pipe)}
        known = json.loads(to.read_text(encoding="utf-8")) if to.exists() else []
        kept = [r for r in known if (r["model"], r["name"]) != (model, row["name"])]
        text = json.dumps([*kept, row], indent=1, allow_nan=False) + "\n"
        output.write(to, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        print(json.dumps({k: v for k, v in row.items() if k not in ("command", "environment")}), flush=True)


if __name__ == "__main__":
    typer.run(main)
