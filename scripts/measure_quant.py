"""Quality and speed of every quantization scheme; writes benchmarks/quant-quality.json and benchmarks/quant-speed.json.

    python scripts/measure_quant.py quality --model shapes-unet [--only w8a8]    # adds to quant-quality.json
    python scripts/measure_quant.py speed [--rounds 7]                           # writes quant-speed.json

Quality: held-out captions, image k with seed k, against the float images of the same seeds; ranges are calibrated on
other captions. Rows are written as they are measured, in the place of older ones of the same model and name.
Speed: CPU seconds of one thread, in interleaved rounds, so that other processes count little; every contender is
timed on the same input, in a UNet of 114 million random weights and in the embedded models. torchao, quanto and SDNQ
take part if they are installed.
"""

from __future__ import annotations

import copy
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure_cachequant import Study
from torch import nn

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.config import Config
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.ranges import calibrate_ranges
from fastdiff.quant.activations import Present
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import chosen
from fastdiff.quant.install import QuantReport, quantize_model
from fastdiff.quant.observe import Observer

FOLDER = Path(__file__).parents[1] / "benchmarks"
CALIBRATED: dict[str, dict[str, Any]] = {
    "w8a8 static": {"method": "w8a8"},
    "w8a8 static, 1 bucket": {"method": "w8a8", "timestep_buckets": 1},
    "w8a8 static, mse": {"method": "w8a8", "observer": "mse"},
    "w8a8 static, percentile 99.9": {"method": "w8a8", "observer": "percentile", "percentile": 99.9},
    "w8a8 static, percentile 99.99": {"method": "w8a8", "observer": "percentile", "percentile": 99.99},
    "w8a8 static, percentile 99.999": {"method": "w8a8", "observer": "percentile", "percentile": 99.999},
    "w8a8 static, smooth 0.5": {"method": "w8a8", "smooth": 0.5},
    "w8a8 static, smooth percentile": {"method": "w8a8", "smooth": "percentile"},
    "w8a8 static, split": {"method": "w8a8", "split": True},
    "w4a8 static": {"method": "w4a8"},
    "w4a8 static, smooth percentile": {"method": "w4a8", "smooth": "percentile"},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "float": {},
    "w8a8 dynamic": {"method": "w8a8"},
    "w8a8 static": CALIBRATED["w8a8 static"],
    "w4a16": {"method": "w4a16"},
    "w8a16": {"method": "w8a16"},
    "w4a8 dynamic": {"method": "w4a8"},
    "fp8": {"method": "fp8"},
    "w4a16 nearest": {"method": "w4a16", "rounding": "nearest"},
    "w4a16 normal grid": {"method": "w4a16", "grid": "normal"},
    "w4a16 low rank 8": {"method": "w4a16", "low_rank": 8},
    **CALIBRATED,
}
app = typer.Typer(add_completion=False)


@app.command()
def quality(
    model: Annotated[str, typer.Option()] = "shapes-unet",
    only: Annotated[list[str] | None, typer.Option(help="Names of rows.")] = None,
    captions: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    fit: Annotated[int, typer.Option(min=1, help="Captions to calibrate on.")] = 8,
    file: Annotated[Path, typer.Option()] = FOLDER / "quant-quality.json",
) -> None:
    """PSNR, SSIM, prompt accuracy and bytes of every scheme."""
    torch.set_num_threads(1)
    study = Study(model, steps, captions, batch, fit)
    for name in only or SCHEMES:
        settings = (
            {"speed": "smallest", **SCHEMES[name]} if SCHEMES[name] else {}
        )  # all layers, whatever the clock says
        if name in CALIBRATED:
            settings["ranges"] = _calibrated(study, name, settings)
        config = Config(quant=settings) if settings else Config()
        extra: dict[str, Any] = {"quant": {k: v for k, v in settings.items() if k != "ranges"}}
        if settings:
            with fastdiff.accelerate(study.pipe, config) as handle:
                report = handle.quantized.report  # type: ignore[union-attr]
            extra |= {"layers": len(report.layers), "bytes_before": report.before, "bytes_after": report.after}
            extra |= {"ratio": round(report.before / report.after, 2)}
        row = study.row(name, config, extra)
        _add(file, row, study.pipe)
        print(json.dumps(row), flush=True)


def _calibrated(study: Study, name: str, settings: dict[str, Any]) -> str:
    method: Any = Config(quant=settings).quant
    found = calibrate_ranges(study.pipe, method, study.prompts, batch=study.batch, **study.call)
    path = Path(tempfile.mkdtemp()) / f"ranges-{study.model}-{name.replace(' ', '-').replace(',', '')}.safetensors"
    found.save(path)
    return str(path)


def _add(file: Path, row: dict[str, Any], pipe: Any) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    rows = [old for old in known["rows"] if (old["model"], old["name"]) != (row["model"], row["name"])]
    found = known | {"command": command(), "environment": environment(pipe), "rows": [*rows, row]}
    output.write(file, lambda part: part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))


@app.command()
def speed(
    rounds: Annotated[int, typer.Option(min=3)] = 7,
    only: Annotated[list[str] | None, typer.Option(help="Names of models.")] = None,
    compiled: Annotated[bool, typer.Option(help="With peers that torch.compile compiles: many minutes.")] = True,
    file: Annotated[Path, typer.Option()] = FOLDER / "quant-speed.json",
) -> None:
    """CPU time of a call of the denoiser against float32."""
    torch.set_num_threads(1)
    cases = {"unet of 114M random weights": _large, "shapes-unet": _embedded, "shapes-dit": _embedded}
    found, pipe = [], fastdiff.load("shapes-unet")
    for name in only or cases:
        model, call, parameters = cases[name](name)
        contenders = {"float32": model, **_ours(model, call), **_others(model, call, compiled)}
        row = {"model": name, "parameters": parameters, **_timed(contenders, call, rounds)}
        found.append(row)
        print(json.dumps(row), flush=True)
        told = {"command": command(), "environment": environment(pipe), "threads": 1, "rounds": rounds, "models": found}
        output.write(file, lambda part, t=told: part.write_text(json.dumps(t, indent=1) + "\n", encoding="utf-8"))


def _large(_: str) -> tuple[nn.Module, Callable[[Any], Any], int]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(160, 320, 640), layers_per_block=2, cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    ).eval()  # fmt: skip
    x, t, text = torch.randn(2, 4, 32, 32), torch.tensor(500), torch.randn(2, 77, 768)
    return unet, lambda model: model(x, t, encoder_hidden_states=text)[0], sum(p.numel() for p in unet.parameters())


def _embedded(name: str) -> tuple[nn.Module, Callable[[Any], Any], int]:
    pipe: Any = fastdiff.load(name)
    pipe.set_progress_bar_config(disable=True)
    given: list[Any] = []
    denoiser: Any = anatomies(pipe)[0].denoiser
    hook = denoiser.register_forward_pre_hook(lambda m, a, k: given.append((a, k)), with_kwargs=True)
    pipe("a small red circle", num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    hook.remove()
    args, kwargs = given[0]
    return denoiser, lambda model: model(*args, **kwargs)[0], sum(p.numel() for p in denoiser.parameters())


def _timed(contenders: dict[str, Any], call: Callable[[Any], Any], rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    errors, refused = {}, {}
    with torch.no_grad():
        truth = call(contenders["float32"])
        for number in range(-2, rounds):
            for name, contender in list(contenders.items()):
                begun = time.process_time()
                try:
                    found = call(contender)
                except Exception as error:  # a peer may refuse anything
                    refused[name] = str(error).splitlines()[0][:160]
                    del contenders[name]
                    continue
                taken = time.process_time() - begun
                errors[name] = round(float((found - truth).norm() / truth.norm()), 4)
                if number >= 0:  # the first calls compile and warm up
                    seconds[name].append(taken)
                elif number == -1 and taken > 60:
                    refused[name] = f"a single call took {taken:.0f} s"
                    del contenders[name]
                print(f"{name}: {taken:.2f} s", file=sys.stderr, flush=True)
    base = seconds["float32"]
    rows = {}
    for name in contenders:
        ratios = [b / s for b, s in zip(base, seconds[name], strict=True)]
        rows[name] = {
            "seconds": round(statistics.median(seconds[name]), 4), "speedup": round(statistics.median(ratios), 3),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)], "output_error": errors[name],
        }  # fmt: skip
    return {"contenders": rows, "refused": refused}


def _ours(model: nn.Module, call: Callable[[Any], Any]) -> dict[str, nn.Module]:
    found = {}
    for name in ("w8a8 dynamic", "w8a8 static", "w8a16", "w4a16", "w4a8 dynamic"):
        changed = copy.deepcopy(model)
        method: Any = Config(quant=SCHEMES[name]).quant
        quantize_model(
            changed, "denoiser", method, lambda parent, child, layer: parent._modules.__setitem__(child, layer),
            Present(), QuantReport(name), ranges=_ranges(model, method, call) if name in CALIBRATED else None,
        )  # fmt: skip
        found[name] = changed
    return found


def _ranges(model: nn.Module, method: QuantMethod, call: Callable[[Any], Any]) -> dict[str, Any]:
    """Of the input that is timed; the error of a random model says nothing of a trained one anyway."""
    observer = Observer([layer for layer, _ in chosen(method, model)], 1)
    with observer.watching(), torch.no_grad():
        call(model)
    return observer.ranges(method.model_copy(update={"timestep_buckets": 1}), {})


def _others(model: nn.Module, call: Callable[[Any], Any], compiled: bool) -> dict[str, Any]:
    """Peers, each with weights only and with what its fastest on a CPU should be; "compiled" by torch.compile."""

    def torchao(config: str) -> Callable[[nn.Module], None]:
        ao: Any = importlib.import_module("torchao.quantization")
        return lambda m: ao.quantize_(m, getattr(ao, config)())

    def quanto(**dtypes: str) -> Callable[[nn.Module], None]:
        q: Any = importlib.import_module("optimum.quanto")

        def change(m: nn.Module) -> None:
            q.quantize(m, **{name: getattr(q, dtype) for name, dtype in dtypes.items()})
            with q.Calibration(), torch.no_grad():
                call(m)
            q.freeze(m)

        return change

    def sdnq(**options: bool) -> Callable[[nn.Module], None]:
        library: Any = importlib.import_module("sdnq")
        return lambda m: library.sdnq_post_load_quant(
            m, weights_dtype="int8", quant_conv=True, add_skip_keys=False, **options
        )

    products = {"use_quantized_matmul": True, "use_quantized_matmul_conv": True}
    makers: dict[str, Callable[[], Callable[[nn.Module], None]]] = {
        "float32 compiled": lambda: lambda m: None,
        "torchao int8 weights": lambda: torchao("Int8WeightOnlyConfig"),
        "torchao int8 dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "torchao int8 dynamic compiled": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "quanto int8 weights": lambda: quanto(weights="qint8"),
        "quanto int8 weights and activations": lambda: quanto(weights="qint8", activations="qint8"),
        "SDNQ int8 weights": lambda: sdnq(),
        "SDNQ int8 products": lambda: sdnq(**products),
        "SDNQ int8 products compiled": lambda: sdnq(**products),
    }
    found: dict[str, Any] = {}
    for name, maker in makers.items():
        if name.endswith("compiled") and not compiled:
            continue
        try:
            changed = copy.deepcopy(model)
            maker()(changed)
            found[name] = torch.compile(changed) if name.endswith("compiled") else changed
        except Exception as error:  # not installed, or it refuses this model
            said = str(error).splitlines()[0][:120] if str(error) else ""
            print(f"{name}: {type(error).__name__} {said}", flush=True)
    return found


if __name__ == "__main__":
    app()
