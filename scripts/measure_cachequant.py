"""Quality of caching with quantization, mixed bits, pruning and rounding on held-out captions: benchmarks/*.json.

    python scripts/measure_cachequant.py cachequant --model shapes-unet     # adds to benchmarks/cachequant.json
    python scripts/measure_cachequant.py halves --model shapes-unet         # adds to benchmarks/cachequant-halves.json
    python scripts/measure_cachequant.py mixed --model shapes-unet          # adds to benchmarks/quant-mixed.json
    python scripts/measure_cachequant.py prune --model shapes-unet          # adds to benchmarks/quant-prune.json
    python scripts/measure_cachequant.py rounding --model shapes-unet       # adds to benchmarks/quant-rounding.json
    python scripts/measure_cachequant.py blocks --model shapes-unet         # adds its row to the same

Image k has caption k of the held-out split and seed k; every row is compared with the float, uncached images of the
same seeds. Plans are made on other captions. Rows are written as they are measured, in the place of older ones of the
same model and name.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

import fastdiff
from fastdiff import output
from fastdiff.bench import checker, metrics
from fastdiff.bench.measure import draw, to_bytes
from fastdiff.bench.row import command, environment
from fastdiff.bench.scenes import scenes
from fastdiff.config import Config
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.hearing import hear_each
from fastdiff.pipelines.planning import plan
from fastdiff.pipelines.quantize import quantize
from fastdiff.quant.base import KEPT
from fastdiff.quant.layer import QLayer
from fastdiff.quant.pruning import prune as removable
from fastdiff.quant.schemes.mixed import BitPlan, Mixed
from fastdiff.quant.sensitivity import FORMAT

FOLDER = Path(__file__).parents[1] / "benchmarks"
FILES = {
    "cachequant": "cachequant.json",
    "halves": "cachequant-halves.json",
    "mixed": "quant-mixed.json",
    "prune": "quant-prune.json",
    "rounding": "quant-rounding.json",
    "blocks": "quant-rounding.json",
}
_ALL: dict[str, Any] = {"speed": "smallest"}  # all layers run quantized, whatever the clock says
_EIGHT = {"method": "w8a8", **_ALL}
Rows = Iterator[tuple[str, Config, dict[str, Any]]]
# a cached step of a UNet leaves out all of it: inside its outermost skip connection it would still cost a seventh
CACHE = {
    "shapes-unet": {"method": "cachequant", "site": "output", "coordinate": "logsnr"},
    "shapes-dit": {"method": "cachequant", "site": "stack", "live_blocks": 0, "coordinate": "logsnr"},
}
# where quantized layers read the cached value: behind the innermost skips, and a last projection that is not left float
FED = {
    "shapes-unet": ({"site": "inner"}, {}),
    "shapes-dit": ({"site": "stack", "live_blocks": 1}, {"keep": [name for name in KEPT if name != "proj_out"]}),
}


class Study:
    """A pipeline, its float images, and what rows are compared by."""

    def __init__(self, model: str, steps: int, captions: int, batch: int, fit: int) -> None:
        self.model, self.steps, self.batch = model, steps, batch
        self.pipe: Any = fastdiff.load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.asked = scenes(0, captions, held_out=True)
        self.prompts = [scene.caption for scene in scenes(0, fit, held_out=False)]
        self.call = {"num_inference_steps": steps, "guidance_scale": 3.0}
        self.truth, self.baseline = self.images(Config())

    @property
    def denoiser(self) -> nn.Module:
        return anatomies(self.pipe)[0].denoiser

    def images(self, config: Config) -> tuple[np.ndarray, dict[str, Any]]:
        """Images of all captions with a config, and what making them took."""
        found, begun = [], time.process_time()
        with fastdiff.accelerate(self.pipe, config) as handle, counted(self.denoiser) as operations:
            for start in range(0, len(self.asked), self.batch):
                some = self.asked[start : start + self.batch]
                seeds = list(range(start, start + len(some)))
                found.append(draw(self.pipe, [s.caption for s in some], seeds, self.steps, 3.0))
            computed = handle.report.computed
        seconds = (time.process_time() - begun) / len(self.asked)
        told = {"computed_steps": computed, "gigaoperations": round(operations[0] / len(self.asked) / 1e9, 4)}
        return np.concatenate(found), told | {"cpu_seconds_per_image": round(seconds, 3)}

    def row(self, name: str, config: Config, extra: dict[str, Any]) -> dict[str, Any]:
        images, told = (self.truth, self.baseline) if name == "float" else self.images(config)
        marks = [checker.mark(image, scene) for image, scene in zip(to_bytes(images), self.asked, strict=True)]
        ratio = self.baseline["gigaoperations"] / told["gigaoperations"]
        return {
            "model": self.model, "name": name, "steps": self.steps, "captions": len(self.asked),
            "psnr": round(float(metrics.psnr(images, self.truth).mean()), 2),
            "ssim": round(float(metrics.ssim(images, self.truth).mean()), 4),
            "prompt_accuracy": round(checker.summary(marks)["prompt_accuracy"], 4),
            **told, "fewer_operations": round(ratio, 2), **extra,
        }  # fmt: skip


@contextmanager
def counted(root: nn.Module) -> Iterator[list[int]]:
    """Counts multiply-adds of linear and convolution layers, quantized ones too; attention's products are left out."""
    total = [0]

    def hook(layer: Any, _inputs: tuple, y: torch.Tensor) -> None:
        conv = isinstance(layer, nn.Conv2d)
        each = math.prod((layer.in_channels // layer.groups, *layer.kernel_size)) if conv else layer.in_features
        total[0] += y.numel() * each

    layers = [layer for layer in root.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield total
    finally:
        for one in hooks:
            one.remove()


def cachequant(study: Study, interval: int) -> Rows:
    """Cache only, quantization only, both as they come, with the schedule, with the correction."""
    known = CACHE[study.model] | {"interval": interval}

    def planned(**levers: Any) -> Config:
        return calibrate(study.pipe, Config(**levers), study.prompts, batch=study.batch, **study.call)

    def uniform(config: Config, **settings: Any) -> Config:
        """The same number of computed steps, evenly spread, uncorrected."""
        method: Any = config.cache
        count = len(method.plan.compute)
        steps = sorted({round(k * study.steps / count) for k in range(count)})
        plan = method.plan.model_copy(update={"compute": tuple(steps), "affine": {}, "layers": {}, "error": None})
        return config.model_copy(update={"cache": method.model_copy(update={"plan": plan, **settings})})

    yield "float", Config(), {}
    better = known | {"predictor": "adams_bashforth"}
    schedule = planned(cache=better | {"correct": False}, quant=_EIGHT)
    yield "naive both: even steps, reuse", uniform(schedule, predictor="reuse"), {}
    yield "both + predictor", uniform(schedule), {}
    yield "both + predictor + schedule", schedule, {"plan": list(schedule.cache.plan.compute)}  # type: ignore
    full = planned(cache=better, quant=_EIGHT)
    yield "both + predictor + schedule + correction", full, {"fed_layers": len(full.cache.plan.layers)}  # type: ignore
    yield "quantization only", Config(quant=_EIGHT), {}
    alone = planned(cache=better)
    yield "cache only: predictor, schedule, correction", alone, {}
    yield "cache only: even steps, reuse", uniform(alone, predictor="reuse"), {}


def halves(study: Study, interval: int) -> Rows:
    """Both halves of the correction by themselves, on reuse as in the paper and on a line: of the cached value, and of
    the quantized layers that it feeds."""
    site, kept = FED[study.model]
    for scheme, predictor in (("w8a8", "reuse"), ("w4a8", "reuse"), ("w8a8", "adams_bashforth")):
        cache = {"method": "cachequant", "coordinate": "logsnr", "interval": interval, "predictor": predictor, **site}
        quant = {"method": scheme, **kept, **_ALL}
        whole = calibrate(study.pipe, Config(cache=cache, quant=quant), study.prompts, batch=study.batch, **study.call)
        method: Any = whole.cache
        told = {"plan": list(method.plan.compute), "fed_layers": len(method.plan.layers)}
        parts = {"schedule": ("affine", "layers"), "cached value": ("layers",), "fed layers": ("affine",), "both": ()}
        for name, gone in parts.items():
            plan = method.plan.model_copy(update={half: {} for half in gone})
            config = whole.model_copy(update={"cache": method.model_copy(update={"plan": plan})})
            yield f"{scheme}, {predictor}: {name}", config, told


def mixed(study: Study, _interval: int) -> Rows:
    """Bits by layer against the same bits for all, at equal bytes."""
    yield "float", Config(), {"denoiser_mb": round(size_of(study, Config()) / 1e6, 4)}
    table = None
    for name, uniform in (
        ("int4, groups of 16", {"method": "w4a16", "group_size": 16, **_ALL}),
        ("int8", {"method": "w8a16", **_ALL}),
    ):
        config = Config(quant=uniform)
        budget = size_of(study, config)
        yield f"uniform: {name}", config, {"denoiser_mb": round(budget / 1e6, 4)}
        method = Mixed(budget_mb=budget / 1e6, plan=table, **_ALL)
        table = plan(study.pipe, method, study.prompts[:4], batch=4, **study.call)
        method = method.model_copy(update={"plan": table})
        assert isinstance(table, BitPlan) and table.bytes <= budget
        yield f"mixed: bytes of {name}", Config(quant=method), {
            "denoiser_mb": round(size_of(study, Config(quant=method)) / 1e6, 4),
            "predicted_error": round(table.predicted**0.5, 5), "measured_error": round(table.measured**0.5, 5),
            "additivity": round(table.additivity, 4),
            "layers": {b: sum(bits == b for bits in table.bits.values()) for b in FORMAT},
        }  # fmt: skip
    yield (
        "uniform: int4, groups of 64",
        (four := Config(quant={"method": "w4a16", **_ALL})),
        {"denoiser_mb": round(size_of(study, four) / 1e6, 4)},
    )


def prune(study: Study, _interval: int) -> Rows:
    """Removal alone and with 4-bit weights, at several gates."""
    yield "float", Config(), {"denoiser_mb": round(size_of(study, Config()) / 1e6, 4)}
    for gate, rank in ((1e-4, 0), (1e-3, 0), (1e-3, 16)):
        (calls,) = hear_each(study.pipe, study.prompts, batch=4, **study.call).values()
        plan = removable(calls, max_error=gate, rank=rank)
        total = sum(p.numel() for p in study.denoiser.parameters())
        told = {"removed": [r.path for r in plan.removed], "parameters_removed": round(plan.parameters / total, 4)}
        told |= {"output_error": round(plan.error**0.5, 5)}
        for quant in ("w4a16", "w8a16"):
            config = Config(quant={"method": quant, "prune": plan, **_ALL})
            told["denoiser_mb"] = round(size_of(study, config) / 1e6, 4)
            yield f"prune {gate:g} rank {rank} + {quant}", config, dict(told)
    for quant in ("w4a16", "w8a16"):
        config = Config(quant={"method": quant, **_ALL})
        yield quant, config, {"denoiser_mb": round(size_of(study, config) / 1e6, 4)}


def rounding(study: Study, _interval: int) -> Rows:
    """Three ways to round 4-bit weights; output_error is on the calls that flexround learns from, images are not."""
    for way in ("nearest", "mse", "flexround"):
        yield _rounded(study, way, {"rounding": way})


def blocks(study: Study, _interval: int) -> Rows:
    """The row of flexround on the outputs of blocks, beside those of `rounding`."""
    yield _rounded(study, "flexround, blocks", {"rounding": "flexround", "reconstruct": "block"})


def _rounded(study: Study, name: str, options: dict[str, Any]) -> tuple[str, Config, dict[str, Any]]:
    study.pipe = fastdiff.load(study.model)
    study.pipe.set_progress_bar_config(disable=True)
    config, begun = {"quant": {"method": "w4a16", **options}}, time.process_time()
    report = quantize(study.pipe, config, study.prompts[:4], batch=4, **study.call)
    seconds = round(time.process_time() - begun, 1)
    assert report.output_error is not None
    return f"w4a16 {name}", Config(), {"output_error": round(report.output_error, 5), "cpu_seconds": seconds}


def size_of(study: Study, config: Config) -> int:
    """Bytes of the denoiser's weights as they are stored."""
    with fastdiff.accelerate(study.pipe, config):
        total = 0  # not of the state_dict, in which quantized layers are the float ones
        for part in study.denoiser.modules():
            gone = part._non_persistent_buffers_set
            buffers = [t for name, t in part.named_buffers(recurse=False) if name not in gone]
            own = [*part.parameters(recurse=False), *buffers]
            total += part.nbytes if isinstance(part, QLayer) else sum(t.nbytes for t in own)
        return total


STUDIES: dict[str, Callable[[Study, int], Rows]] = {
    "cachequant": cachequant,
    "halves": halves,
    "mixed": mixed,
    "prune": prune,
    "rounding": rounding,
    "blocks": blocks,
}


def main(
    study: Annotated[str, typer.Argument(help=", ".join(STUDIES))],
    model: Annotated[str, typer.Option(help="shapes-unet or shapes-dit")] = "shapes-unet",
    steps: Annotated[int, typer.Option(min=2)] = 50,
    captions: Annotated[int, typer.Option(min=1, help="held-out captions, one image each")] = 64,
    interval: Annotated[int, typer.Option(min=2, help="mean steps in a group of cachequant")] = 5,
    fit: Annotated[int, typer.Option(min=2, help="captions to calibrate on")] = 8,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    to: Annotated[Path | None, typer.Option(help="another file than the one in benchmarks/")] = None,
) -> None:
    """Measure one study on one model."""
    metrics.require_extra()
    torch.set_num_threads(threads)
    target = to or FOLDER / FILES[study]
    work = Study(model, steps, captions, batch, fit)
    for name, config, extra in STUDIES[study](work, interval):
        keep(target, work.row(name, config, extra), work.pipe)


def keep(target: Path, row: dict[str, Any], pipe: Any) -> None:
    """Print a row, and write it in the place of an older one of the same model and name."""
    print(json.dumps(row), flush=True)
    row |= {"command": command(), "environment": environment(pipe)}
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
    rows = [r for r in known if (r["model"], r["name"]) != (row["model"], row["name"])] + [row]
    text = json.dumps(rows, indent=2, allow_nan=False) + "\n"
    output.write(target, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
