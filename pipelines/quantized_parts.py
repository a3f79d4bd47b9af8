"""The components of a directory that holds a quantized pipeline, read and built bit by bit as they were."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from torch import Tensor, nn

from fastdiff.errors import BadModel
from fastdiff.quant.activations import Present
from fastdiff.quant.build import made
from fastdiff.quant.calibration import Origin
from fastdiff.quant.layer import QLayer
from fastdiff.quant.prune import PrunePlan
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.standing import Standing, standing

from .quantizing import print_of
from .stored import places, tensors_of

INDEX = "fastdiff_quant.json"
# of a component: what the names of its tensors begin with, and what is done when they are in their places
Pieces: TypeAlias = Sequence[tuple[str, Callable[[], None]]]


def is_quantized(directory: Path) -> bool:
    return (directory / INDEX).is_file()


def load_components(
    directory: Path, dtype: torch.dtype, cut: Callable[[str, nn.Module], Pieces] = lambda name, module: ()
) -> dict[str, nn.Module]:  # fmt: skip
    """The quantized components of a directory that `save` wrote, on the CPU, bit by bit as they were. `cut` names
    pieces of one that are read first, one by one.

    Raises BadModel for a broken description, tensors that are missing, of a wrong size, or not the model's.
    """
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        classes = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        if index["version"] != 1:
            raise ValueError(f"version {index['version']} is not known to this fastdiff")
        return {
            name: _component(directory / name, classes[name], described, dtype, cut)
            for name, described in index["components"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadModel(f"{str(directory / INDEX)!r} is no description of a quantized pipeline: {said}") from None


def structure(module: nn.Module) -> nn.Module:
    """A model like this one, made of its configuration, with weights that take no memory."""
    state = standing(module)
    assert state is not None
    return pruned(_unweighted(type(module), module.config), state.method)


def align(pipe: Any) -> None:
    """Tensors mapped from a file lie where the file has them; MKL sums in another order where they are not aligned as
    those of the pipeline that was saved, and not to the last bit the same."""
    for part in pipe.components.values():
        for tensor in [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else ():
            if tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()


def _component(
    folder: Path, named: list[str], described: Mapping[str, Any], dtype: torch.dtype,
    cut: Callable[[str, nn.Module], Pieces],
) -> nn.Module:  # fmt: skip
    module = pruned(empty(folder, *named), described["method"])
    origin = None if described["origin"] is None else Origin(**described["origin"])
    told = described.get("times", {}).items()  # none in the files of earlier versions
    present = Present(times={key: {name: float(ms) for name, ms in row.items()} for key, row in told if row})
    layers, done = dict(described["layers"]), set[str]()
    for begin, then in (*cut(folder.name, module), ("", lambda: None)):
        tensors = tensors_of(folder, begin, done)
        for name in [name for name in layers if f"{name}.".startswith(begin)]:
            own = {k.rpartition(".")[2]: tensors.pop(k) for k in [k for k in tensors if k.rpartition(".")[0] == name]}
            parent, _, child = name.rpartition(".")
            layer = _layer(folder, name, module.get_submodule(name), Recipe(**layers.pop(name)), own, present)
            layer.dtype = type_of(f"{name}.weight", module, dtype)
            module.get_submodule(parent)._modules[child] = layer
        if foreign := sorted(tensors.keys() - places(module).keys()):
            raise BadModel(f"{str(folder)!r} holds tensors that are not the model's: {', '.join(foreign[:3])}")
        floats = {k: t.to(type_of(k, module, dtype)) if t.is_floating_point() else t for k, t in tensors.items()}
        module.load_state_dict(floats, strict=False, assign=True)
        then()
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    if missing := sorted(k for k, t in places(module).items() if t.is_meta):
        raise BadModel(f"{str(folder)!r} lacks tensors of the model: {', '.join(missing[:3])}; fetch it again")
    Standing(described["method"], present, origin).attach(module)
    return module.eval().requires_grad_(False)


def pruned(module: nn.Module, method: Mapping[str, Any]) -> nn.Module:
    """The model without what its method removed."""
    given = method.get("prune")
    if given is not None and (plan := PrunePlan.model_validate(given)).denoiser == print_of("", module):
        plan.take_out(module, lambda parent, name, put: parent._modules.__setitem__(name, put))
    return module


def type_of(name: str, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The type that a class has its tensor of this name in, where it is loaded as `dtype`.

    Classes of diffusers keep modules in float32 whatever is asked for, those of transformers from float16, and some
    from bfloat16 too.
    """
    kept = [*(getattr(module, "_keep_in_fp32_modules", None) or ())]
    if hasattr(module, "_keep_in_fp32_modules_strict"):
        if dtype not in (torch.float16, torch.bfloat16):
            return dtype
        strict: Any = module._keep_in_fp32_modules_strict or ()
        kept = [*(kept if dtype == torch.float16 else ()), *strict]
    inside = f".{name}."
    return torch.float32 if any(f".{part}." in inside for part in kept) else dtype


def empty(folder: Path, library: str, name: str) -> nn.Module:
    """The model's structure, with weights that take no memory."""
    if library not in ("diffusers", "transformers"):
        raise BadModel(
            f"{folder.name} is a {library}.{name}; only components of diffusers and transformers can be read"
        )
    kind = getattr(importlib.import_module(library), name)
    read = kind.load_config if library == "diffusers" else kind.config_class.from_pretrained
    return _unweighted(kind, read(folder))


def _unweighted(kind: Any, config: Any) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        made: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    return made


def _layer(
    folder: Path, name: str, like: nn.Module, recipe: Recipe, tensors: dict[str, Tensor], present: Present
) -> QLayer:
    if not isinstance(like, nn.Conv2d | nn.Linear):
        raise BadModel(f"{name} of {str(folder)!r} is described as quantized, but is a {type(like).__name__}")
    layer = made(like, recipe, tensors, present)
    try:
        shapes = {key: t.to("meta") for key, t in layer.tensors().items()}  # of which nothing is made float
        fits = "q" in tensors and layer.format.unpack(shapes, layer.matrix_shape[1]).shape == layer.matrix_shape
    except (KeyError, RuntimeError, IndexError):
        fits = False
    has_bias = like.bias is not None
    if not fits or has_bias != ("bias" in tensors) or ("low" in tensors) != ("high" in tensors):
        raise BadModel(f"the tensors of {name} in {str(folder)!r} are missing or of a wrong size; fetch it again")
    return layer
