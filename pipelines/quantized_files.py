"""A quantized pipeline as a directory: the stock layout, integers in the safetensors files, and one JSON more."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdiff.errors import BadConfig, BadModel, FastdiffError, UnsupportedModel
from fastdiff.quant.activations import Present
from fastdiff.quant.build import made
from fastdiff.quant.calibration import Origin
from fastdiff.quant.install import QuantReport
from fastdiff.quant.layer import QLayer
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.standing import Standing, standing

from .quantizing import print_of

INDEX = "fastdiff_quant.json"
REPORT = "fastdiff_quant_report.json"


def save(pipe: Any, directory: str | Path, report: QuantReport | None = None) -> Path:
    """Write a pipeline that `quantize` made; `fastdiff.load` reads it. Complete or absent; never over something.
    `report` is what `quantize` gave, to be written with it.

    Raises UnsupportedModel for a pipeline that holds no quantized component, BadConfig for a directory that exists.
    """
    target = Path(directory).expanduser()
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and standing(part)}
    if not parts:
        raise UnsupportedModel(f"this {type(pipe).__name__} is not quantized for good; call fastdiff.quantize first")
    check_target(target)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        pipe.save_pretrained(folder, safe_serialization=True)
        index = {"version": 1, "components": {name: _described(part) for name, part in parts.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if report is not None:
            (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        folder.chmod(0o755)  # mkdtemp's are for their owner only
        folder.replace(target)
    except OSError as error:
        raise FastdiffError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def check_target(target: Path) -> None:
    if target.exists():
        raise BadConfig(f"{str(target)!r} exists; give the name of a new directory")
    if not target.parent.is_dir():
        raise BadConfig(f"directory {str(target.parent)!r} does not exist")


def _described(part: nn.Module) -> dict[str, Any]:
    state = standing(part)
    assert state is not None
    layers = {name: asdict(m.recipe) for name, m in part.named_modules() if isinstance(m, QLayer)}
    origin = None if state.origin is None else state.origin.model_dump(mode="json")
    return {"method": state.method, "origin": origin, "layers": layers}


def is_quantized(directory: Path) -> bool:
    return (directory / INDEX).is_file()


def load_components(directory: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The quantized components of a directory that `save` wrote, on the CPU, bit by bit as they were.

    Raises BadModel for a broken description, tensors that are missing, of a wrong size, or not the model's.
    """
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        classes = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        if index["version"] != 1:
            raise ValueError(f"version {index['version']} is not known to this fastdiff")
        return {
            name: _component(directory / name, classes[name], described, dtype)
            for name, described in index["components"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadModel(f"{str(directory / INDEX)!r} is no description of a quantized pipeline: {said}") from None


def align(pipe: Any) -> None:
    """Tensors mapped from a file lie where the file has them; MKL sums in another order where they are not aligned as
    those of the pipeline that was saved, and not to the last bit the same."""
    for part in pipe.components.values():
        for tensor in [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else ():
            if tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()


def _component(folder: Path, named: list[str], described: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    module = _empty(folder, *named)
    pruned = described["method"].get("prune")
    if pruned is not None and (plan := PrunePlan.model_validate(pruned)).denoiser == print_of(folder.name, module):
        plan.take_out(module, lambda parent, name, put: parent._modules.__setitem__(name, put))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: t.clone() for name, t in load_file(file).items()}  # one view would keep the whole file mapped
    origin = None if described["origin"] is None else Origin(**described["origin"])
    present = Present()
    for name, recipe in described["layers"].items():
        own = {k.rpartition(".")[2]: tensors.pop(k) for k in [k for k in tensors if k.rpartition(".")[0] == name]}
        parent, _, child = name.rpartition(".")
        like = module.get_submodule(name)
        module.get_submodule(parent)._modules[child] = _layer(folder, name, like, Recipe(**recipe), own, present)
    expected = {k for k, t in module.state_dict().items() if t.is_meta}
    if foreign := sorted(tensors.keys() - module.state_dict().keys()):
        raise BadModel(f"{str(folder)!r} holds tensors that are not the model's: {', '.join(foreign[:3])}")
    floats = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    module.load_state_dict(floats, strict=False, assign=True)
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    if missing := sorted(k for k in expected - tensors.keys() if module.state_dict()[k].is_meta):
        raise BadModel(f"{str(folder)!r} lacks tensors of the model: {', '.join(missing[:3])}; fetch it again")
    Standing(described["method"], present, origin).attach(module)
    return module.eval().requires_grad_(False)


def _empty(folder: Path, library: str, name: str) -> nn.Module:
    """The model's structure, with weights that take no memory."""
    if library not in ("diffusers", "transformers"):
        raise BadModel(
            f"{folder.name} is a {library}.{name}; only components of diffusers and transformers can be read"
        )
    kind = getattr(importlib.import_module(library), name)
    with init_empty_weights(include_buffers=False):
        if library == "transformers":
            model: nn.Module = kind(kind.config_class.from_pretrained(folder))
        else:
            model = kind.from_config(kind.load_config(folder))
    return model


def _layer(
    folder: Path, name: str, like: nn.Module, recipe: Recipe, tensors: dict[str, Tensor], present: Present
) -> QLayer:
    if not isinstance(like, nn.Conv2d | nn.Linear):
        raise BadModel(f"{name} of {str(folder)!r} is described as quantized, but is a {type(like).__name__}")
    layer = made(like, recipe, tensors, present)
    try:
        fits = "q" in tensors and layer.matrix().shape == layer.matrix_shape
    except (KeyError, RuntimeError, IndexError):
        fits = False
    has_bias = like.bias is not None
    if not fits or has_bias != ("bias" in tensors) or ("low" in tensors) != ("high" in tensors):
        raise BadModel(f"the tensors of {name} in {str(folder)!r} are missing or of a wrong size; fetch it again")
    return layer
