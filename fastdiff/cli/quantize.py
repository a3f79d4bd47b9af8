"""`fastdiff quantize`: write a quantized copy of a model, or only the ranges that calibration found for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .calibration import Calibration, calibrating, progress
from .options import Json

if TYPE_CHECKING:
    from fastdiff.config import Layer
    from fastdiff.quant.base import QuantMethod
    from fastdiff.quant.install import QuantReport


@calibrating
def quantize(
    asked: Calibration,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A directory; or FILE.safetensors: ranges; or FILE.json: a plan.")
    ],
    prompts: Annotated[int, typer.Option(min=0, help="Images to calibrate on; 0 finds ranges at each call.")] = 8,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Measure each layer alone, too: what errors should add up to; a call for each."),
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also time float under torch.compile; slow.")] = False,
    report: Annotated[Path | None, typer.Option(help="Another file for the report that the directory has.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files (never directories).")] = False,
    as_json: Json = False,
) -> None:
    """Write a copy of a model with quantized weights, which `-m DIR` and fastdiff.load read like any other.

    The method is --set quant.method=NAME (w8a8 if left out). With a name that ends in .safetensors only the ranges of
    its activations are written, for --set quant.ranges=FILE; with .json only what is planned: what quant.prune=0.03
    removes, for --set quant.prune=FILE, or the bits of quant.method=mixed, for --set quant.plan=FILE.
    """
    layers: list[Layer] = [("quantize", {"quant": {"method": "w8a8"}}), *asked.layers]

    from fastdiff import output as files
    from fastdiff.pipelines import quantize as work
    from fastdiff.pipelines.quantized_files import save

    only = {".safetensors": "ranges", ".json": "plans"}.get(output.suffix)
    files.check([report, *([output] if only else [])], overwrite)
    _check(output, only, prompts)
    if not only and not prompts:
        pipe, done = asked.loaded_quantized(layers)
        save(pipe, output, done)
        _tell(output, done, report, as_json)
        return
    pipe, resolved = asked.loaded(layers)
    texts = asked.texts(pipe, prompts)
    call = asked.call(pipe, texts)
    with progress() as watch:
        if only:
            _write_only(output, pipe, work.method_of(pipe, resolved), texts, call | {"watch": watch})
            return
        done = work.quantize(pipe, resolved, texts, predict=predict, compiled=compiled, watch=watch, **call)
    save(pipe, output, done)
    _tell(output, done, report, as_json)


def _write_only(output: Path, pipe: Any, method: QuantMethod, texts: Sequence[str], told: dict[str, Any]) -> None:
    from fastdiff import output as files
    from fastdiff.pipelines.planning import plan
    from fastdiff.pipelines.ranges import calibrate_ranges
    from fastdiff.studio.console import say

    if output.suffix == ".safetensors":
        files.write(output, calibrate_ranges(pipe, method, texts, **told).save)
    else:
        made = plan(pipe, method, texts, **told)
        files.write(output, lambda part: part.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8"))
        say(made.summary())
    print(output)


def _check(output: Path, only: str | None, prompts: int) -> None:
    from fastdiff.errors import BadConfig
    from fastdiff.pipelines.quantized_files import check_target

    if only and not prompts:
        raise BadConfig(f"{only} need prompts to be calibrated on; give --prompts 8")
    if not only:
        check_target(output)


def _tell(output: Path, done: QuantReport, report: Path | None, as_json: bool) -> None:
    import json
    import shutil

    from fastdiff import output as files
    from fastdiff.pipelines.quantized_files import REPORT
    from fastdiff.studio.console import say

    if report is not None:
        files.write(report, lambda part: shutil.copyfile(output / REPORT, part))
    if as_json:
        told: dict[str, Any] = {key: value for key, value in done.to_dict().items() if key != "layers"}
        print(json.dumps({"file": str(output), "layers": len(done.layers), **told}))
        return
    print(output)
    said = [f"quantized in {done.seconds:.1f} s"] if done.seconds else []  # not where layers were quantized while read
    for note in [*done.notes, *said]:
        say(note)
    if done.output_error is not None:
        predicted = ""
        if done.predicted_error is not None:
            predicted = f" (its layers predict {done.predicted_error:.2%}, found in {done.predict_seconds:.1f} s)"
        say(f"output of the denoiser off by {done.output_error:.2%}{predicted}; speed: {done.speed}")
