"""One line of a benchmark, as it is written to JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from fastdiff.machine import cpu_name, package_version
from fastdiff.pipelines.loading import embedded_name

Kind = Literal["baseline", "fastdiff", "fewer_steps", "peer"]
_PACKAGES = (
    "fastdiff",
    "torch",
    "diffusers",
    "transformers",
    "torchmetrics",
    "DeepCache",
    "cache-dit",
    "tgate",
    "tomesd",
)


class Row(BaseModel):
    """What was measured of one contender; None where it could not be, with the reason in `notes` or `error`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    kind: Kind
    model: str
    scheduler: str
    steps: int  # num_inference_steps of the call
    computed_steps: int | None = None  # in which the denoiser ran in full, median of the timed calls
    latency_s: float | None = None  # median of a whole pipeline call for ONE image: text encoding, denoising, decoding
    latency_iqr_s: float | None = None
    denoising_s: float | None = None  # median from the denoiser's first call to its last return
    speedup: float | None = None  # latency_s of the baseline over this row's, rounds interleaved
    speedup_denoising: float | None = None  # the same ratio of denoising_s
    psnr: float | None = None  # dB against the unaccelerated image of the same seed, mean; 120 is identical
    ssim: float | None = None  # against the same image, mean
    psnr_converged: float | None = None  # dB against the same seed solved with very many steps of the same ODE
    prompt_accuracy: float | None = None  # mean share of the caption's slots that are right
    all_correct: float | None = None  # share of images with every slot right
    peak_memory_mb: float | None = None  # of timed calls: CUDA allocator, or the process's resident memory on a CPU
    spread: dict[str, float]  # over images: psnr_std, psnr_min, computed_steps_min, computed_steps_max
    config: dict[str, Any]  # of a peer: its package, version and settings
    prompts: int  # images that the quality was measured on
    batch: int  # images a call in the quality pass
    rounds: int  # timed calls
    seeds: list[int]
    guidance_scale: float | None  # None is the pipeline's default
    notes: list[str]
    error: str | None = None  # why there is no result
    environment: dict[str, Any]
    command: str


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps([row.model_dump(mode="json") for row in rows], indent=2, allow_nan=False)


def model_name(pipe: Any) -> str:
    """Embedded name, hub id, or the last part of a local path: the rest of it is nobody's business."""
    source = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return embedded_name(pipe) or (Path(source).name if Path(source).exists() else source)


def command() -> str:
    """What a script was called with, so that it can be called again: files of this directory without its path."""
    here = Path.cwd()
    words = [word[len(str(here)) + 1 :] if Path(word).is_relative_to(here) else word for word in sys.argv]
    return shlex.join(["python", *words])


def environment(pipe: Any) -> dict[str, Any]:
    """Where the numbers come from: machine, device, versions."""
    cuda = pipe.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(pipe.device) if cuda else cpu_name(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := package_version(name))},
    }
