"""Loading: embedded models, local directories, hub ids. Safetensors only, checked before anything is built."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from fastdiff.config import Source
from fastdiff.errors import BadConfig, BadModel, UnknownName
from fastdiff.parallel.mesh import own_device
from fastdiff.quant.install import QuantReport

from .quantized_parts import align, is_quantized, load_components
from .quantizing import method_of
from .streamed import rest, streamed, structures

EMBEDDED = Path(__file__).parent / "shapes" / "models"
CALL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "shapes-unet": {"num_inference_steps": 50, "guidance_scale": 3.0},
    "shapes-dit": {"num_inference_steps": 28, "guidance_scale": 3.0},
}
_DTYPE = "torch_dtype" if diffusers.__version__.startswith("0.41.") else "dtype"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def embedded() -> dict[str, Path]:
    """Directories of the models that come with fastdiff, by name."""
    return {path.parent.name: path.parent for path in sorted(EMBEDDED.glob("*/model_index.json"))}


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
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | None = None, quant: Source = None
) -> DiffusionPipeline:  # fmt: skip
    """A stock diffusers pipeline.

    model: `shapes-unet` or `shapes-dit` (come with fastdiff, work offline), a local directory, or a hub id.
    dtype: default float32 on a CPU, bfloat16 on a GPU. device: default CUDA where there is one; under torchrun each
    process of a machine takes a card of its own. quant: a method's name, or anything that `accelerate` takes, with a
    `quant`: the denoiser is read layer by layer and quantized for good, so that its floats are never held at once.

    Raises BadModel for a path that does not exist, is no pipeline, is truncated, or holds pickles only, BadConfig or
    UnsupportedModel for what cannot be quantized.
    """
    if quant is not None:
        return load_quantized(model, quant, dtype=dtype, device=device)[0]
    source, device, dtype = _source(str(model)), *_where(device, dtype)
    if is_quantized(Path(source)):
        pipe = _read(model, source, dtype, load_components(Path(source), dtype))
        align(pipe)
    else:
        pipe = _read(model, source, dtype, {})
    return pipe.to(device)


def load_quantized(
    model: str | Path, quant: Source, *, dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[DiffusionPipeline, QuantReport]:  # fmt: skip
    """`load` with `quant`, and what was done to each layer."""
    source, device, dtype = _source(str(model)), *_where(device, dtype)
    if is_quantized(Path(source)):
        raise BadConfig(f"{str(model)!r} is quantized already; leave out quant, or load the float model")
    if not Path(source).is_dir():
        try:
            source = str(DiffusionPipeline.download(source, use_safetensors=True))
        except Exception as error:
            raise BadModel(f"model {str(model)!r} cannot be loaded: {_first_line(error)}") from error
    found = structures(Path(source))
    family = found[0].family if found else None
    method = method_of(quant, family, str(model) if model in embedded() else None)
    report = QuantReport(method.method)
    parts = streamed(found, Path(source), method, dtype, device, report)
    pipe = _read(model, source, dtype, parts)
    align(pipe)
    rest(pipe.to(device), method, parts, report)
    return pipe, report


def _where(device: str | None, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    if device is None:
        own_device()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16)


def _read(model: str | Path, source: str, dtype: torch.dtype, parts: Mapping[str, nn.Module]) -> Any:
    """The pipeline, with these parts in the place of those of its directory."""
    kind = _kind(Path(source)) if parts else DiffusionPipeline
    try:
        return kind.from_pretrained(source, use_safetensors=True, **{_DTYPE: dtype}, **parts)
    except Exception as error:  # diffusers, transformers and huggingface_hub each raise their own kinds
        raise BadModel(f"model {str(model)!r} cannot be loaded: {_first_line(error)}") from error


def _kind(folder: Path) -> Any:
    """The pipeline's own class: the base class does not take components that are optional in it, but reads them."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    return getattr(diffusers, name, DiffusionPipeline)


def _source(model: str) -> str:
    known = embedded()
    if model in known:
        return str(known[model])
    path = Path(model).expanduser()
    if path.exists():
        check_directory(path)
        return str(path)
    if _HUB_ID.fullmatch(model) and model.count("/") == 1 and not model.endswith((".toml", ".json", ".safetensors")):
        return model
    if "/" in model or model.startswith((".", "~")):
        raise BadModel(f"model directory {model!r} does not exist")
    raise UnknownName("model", model, [*known, "<a directory>", "<a hub id like org/name>"])


def check_directory(path: Path) -> None:
    """Refuse a directory that is no pipeline, or whose weights are truncated, corrupt, or pickles."""
    if not path.is_dir():
        raise BadModel(f"{str(path)!r} is a file; give the pipeline's directory, the one that holds model_index.json")
    index = path / "model_index.json"
    if not index.is_file():
        raise BadModel(f"{str(path)!r} is no diffusers pipeline: it has no model_index.json")
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(components, dict) or "_class_name" not in components:
            raise ValueError("it names no pipeline class")
    except (ValueError, UnicodeDecodeError) as error:
        raise BadModel(f"{str(index)!r} is not a pipeline index: {error}") from None
    named = [name for name, parts in components.items() if isinstance(parts, list) and parts and parts[0] is not None]
    missing = [name for name in named if not (path / name).is_dir()]
    if missing:
        raise BadModel(f"{str(path)!r} is incomplete: model_index.json names {', '.join(missing)}, which is not there")
    for folder in (path / name for name in components if (path / name).is_dir()):
        files = [f for f in sorted(folder.iterdir()) if f.is_file()]
        weights = [f for f in files if f.suffix == ".safetensors"]
        pickles = [f.name for f in files if f.suffix in _PICKLES]
        if pickles and not weights:
            raise BadModel(
                f"{folder.name} in {str(path)!r} has its weights as pickles only ({', '.join(pickles)}), which can run "
                "code when read; convert them to safetensors"
            )
        for file in weights:
            _check_weights(file)


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise BadModel(f"{str(file)!r} is truncated or corrupt: {error}; fetch it again") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
