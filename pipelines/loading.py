"""Loading: embedded models, local directories, hub ids. Safetensors only, checked before anything is built."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fastdiff.config import Source
from fastdiff.errors import BadConfig, BadModel
from fastdiff.parallel.mesh import own_device
from fastdiff.quant.install import QuantReport

from . import portioned, single_files
from .outfit import Outfit
from .quantized_parts import align, is_quantized, load_components
from .quantizing import method_of
from .sources import DTYPE, embedded, first_line, source
from .sources import EMBEDDED as EMBEDDED
from .stored import variant
from .streamed import rest, streamed, structures

CALL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "shapes-unet": {"num_inference_steps": 50, "guidance_scale": 3.0},
    "shapes-dit": {"num_inference_steps": 28, "guidance_scale": 3.0},
}


def embedded_name(pipe: Any) -> str | None:
    """The name of the embedded model that a pipeline was loaded from, if any."""
    path = getattr(pipe.config, "_name_or_path", None)
    return next((name for name, folder in embedded().items() if str(folder) == str(path)), None)


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Steps and guidance where a call names none: the embedded model's own, else those of the pipeline's `__call__`."""
    known = inspect.signature(pipe.__call__).parameters
    stock = {name: known[name].default for name in ("num_inference_steps", "guidance_scale") if name in known}
    return stock | dict(CALL_DEFAULTS.get(embedded_name(pipe) or "", {}))


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | None = None, quant: Source = None,
    base: str | Path | None = None, lora: Sequence[str] = (), scheduler: str | None = None,
    inputs: Collection[str] = (), controlnet: str | None = None, offload: str = "none", vae_tiling: bool = False,
    parallel: Any = None,
) -> DiffusionPipeline:  # fmt: skip
    """A stock diffusers pipeline.

    model: `shapes-unet` or `shapes-dit` (come with fastdiff, work offline), a local directory, a hub id, or a file: a
    checkpoint of A1111, ComfyUI or Black Forest Labs (.safetensors), or a GGUF transformer. base: the directory or hub
    id that has the configuration of a file, and the parts that it lacks; default: where the file lies, else the hub.
    dtype: default float32 on a CPU, bfloat16 on a GPU. device: default CUDA where there is one; under torchrun each
    process of a machine takes a card of its own. quant: a method's name, or anything that `accelerate` takes, with a
    `quant`: the denoiser is read layer by layer and quantized for good, so that its floats are never held at once.
    lora: files, each with `:scale` after it or not. scheduler: a short name, or a class of diffusers.
    inputs: "image", "mask", "control": what is drawn from beside a prompt; the pipeline is one that takes it.
    controlnet: directory or hub id. offload: "model", "group" or "layers" wait on the CPU until they run.
    parallel: what `accelerate` will be given as such. With shard = "blocks" in it all ranks have to call this: each
    reads its shares of the denoiser's blocks alone, and the pipeline draws nothing until it is accelerated.

    Raises BadModel for what does not exist, is no model, is truncated, or holds pickles only, BadConfig or
    UnsupportedModel for what this model cannot do.
    """
    outfit = Outfit(tuple(lora), scheduler, frozenset(inputs), controlnet, offload, vae_tiling)
    shared = portioned.asked(parallel, portioned.obstacle(str(model), quant is not None, offload))
    if quant is not None:
        return load_quantized(model, quant, dtype=dtype, device=device, outfit=outfit)[0]
    device, dtype = where(device, dtype)
    outfit.check(device)
    if single_files.is_file(str(model)):
        pipe = single_files.read(Path(model).expanduser(), None if base is None else str(base), dtype)
    elif base is not None:
        raise BadConfig(f"{str(model)!r} has its own configuration; base is for a single file")
    else:
        found = source(str(model))
        ready = is_quantized(Path(found))
        found = found if shared is None else _here(model, found)
        parts = {} if shared is None else portioned.parts(Path(found), shared, dtype, device)
        pipe = _read(model, found, dtype, load_components(Path(found), dtype) if ready and not parts else parts)
        if ready:
            align(pipe)
    return outfit.put_on(pipe, device)


def load_quantized(
    model: str | Path, quant: Source, *, dtype: torch.dtype | None = None, device: str | None = None,
    outfit: Outfit | None = None,
) -> tuple[DiffusionPipeline, QuantReport]:  # fmt: skip
    """`load` with `quant`, and what was done to each layer."""
    if single_files.is_file(str(model)):
        raise BadConfig(f"{str(model)!r} is one file, which is not read layer by layer; load it, then quantize")
    folder, device, dtype = source(str(model)), *where(device, dtype)
    if is_quantized(Path(folder)):
        raise BadConfig(f"{str(model)!r} is quantized already; leave out quant, or load the float model")
    folder = _here(model, folder)
    found = structures(Path(folder))
    family = found[0].family if found else None
    method = method_of(quant, family, str(model) if model in embedded() else None)
    report = QuantReport(method.method)
    parts = streamed(found, Path(folder), method, dtype, device, report)
    pipe = _read(model, folder, dtype, parts)
    align(pipe)
    rest(pipe.to(device), method, parts, report)
    return (outfit or Outfit()).put_on(pipe, device), report


def _here(model: str | Path, folder: str) -> str:
    """The directory, or what the hub has under this id."""
    try:
        return folder if Path(folder).is_dir() else str(DiffusionPipeline.download(folder, use_safetensors=True))
    except Exception as error:
        raise BadModel(f"model {str(model)!r} cannot be loaded: {first_line(error)}") from error


def where(device: str | None, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    if device is None:
        own_device()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16)


def _read(model: str | Path, source: str, dtype: torch.dtype, parts: Mapping[str, nn.Module]) -> Any:
    """The pipeline, with these parts in the place of those of its directory."""
    kind = _kind(Path(source)) if parts else DiffusionPipeline
    saved: Any = {"use_safetensors": True, "variant": variant(Path(source)), DTYPE: dtype}
    try:
        return kind.from_pretrained(source, **saved, **parts)
    except Exception as error:  # diffusers, transformers and huggingface_hub each raise their own kinds
        raise BadModel(f"model {str(model)!r} cannot be loaded: {first_line(error)}") from error


def _kind(folder: Path) -> Any:
    """The pipeline's own class: the base class does not take components that are optional in it, but reads them."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    return getattr(diffusers, name, DiffusionPipeline)
