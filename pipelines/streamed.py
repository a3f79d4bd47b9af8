"""Loads a denoiser layer by layer and quantizes each before the next is read: memory holds the quantized model and one
float layer, where loading first would hold all of the floats.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from fastdiff.anatomy import Anatomy, recognise
from fastdiff.quant.activations import Present
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import Found
from fastdiff.quant.install import QuantReport, quantize_model
from fastdiff.quant.layer import QLayer
from fastdiff.quant.standing import Standing

from .families import FAMILIES, anatomies
from .quantized_parts import empty, pruned, type_of
from .quantizing import Quantized, quantize_for_good

DENOISERS = ("unet", "transformer", "transformer_2")


class Shards:
    """The tensors of a component's folder, read one by one."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.names = self._files.keys()

    def read(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found


def streamed(
    found: list[Anatomy], folder: Path, method: QuantMethod, dtype: torch.dtype, device: str, report: QuantReport
) -> dict[str, nn.Module]:  # fmt: skip
    """The denoisers of a pipeline's directory (`structures`) read layer by layer and quantized for good; {} where the
    method needs the float model (rounding that learns, a plan to be made), or the files of one have other names."""
    plain = method.rounding != "flexround" and method.ranges is None and method.smooth is None and not method.split
    if not plain or isinstance(method.prune, float) or "denoiser" not in method.components:
        return {}
    methods = {one.component: method.of(one.component, one is found[0]) for one in found}
    made = {
        one.component: _made(one, folder / one.component, own, dtype, device, report)
        for one in found
        if (own := methods[one.component]) is not None
    }
    parts = {name: module for name, module in made.items() if module is not None}
    return parts if len(parts) == len(made) else {}


def rest(pipe: Any, method: QuantMethod, done: Mapping[str, nn.Module], report: QuantReport) -> None:
    """Quantize for good what was not streamed."""
    left = tuple(name for name in method.components if not (name == "denoiser" and done))
    if left:
        made = quantize_for_good(pipe, method.model_copy(update={"components": left}), anatomies(pipe))
        report.layers += made.report.layers
        report.kept += made.report.kept
    report.notes = [*Quantized(method, report).notes(freed=True)]


def structures(folder: Path) -> list[Anatomy]:
    """The denoisers of a directory, as structures without weights."""
    named = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    there = [name for name in DENOISERS if (named.get(name) or [None])[0] == "diffusers"]
    return [recognise(empty(folder / name, *named[name]), name, FAMILIES) for name in there]


def _made(
    anatomy: Anatomy, folder: Path, method: QuantMethod, dtype: torch.dtype, device: str, report: QuantReport
) -> nn.Module | None:  # fmt: skip
    module = pruned(anatomy.denoiser, method.model_dump(mode="json"))
    present = Present()
    with ExitStack() as stack:
        shards, trim = Shards(folder, stack), _malloc_trim()
        needed = module.state_dict()
        if any(t.is_meta and name not in shards.names for name, t in needed.items()) or not isinstance(
            module, ModelMixin
        ):
            return None

        def read(name: str) -> Tensor:
            found = shards.read(name)
            return found.to(device, type_of(name, module, dtype) if found.is_floating_point() else None)

        @contextmanager
        def weights(found: Found) -> Iterator[None]:
            """A layer has its weights for as long as it is quantized."""
            before = dict(found.layer.named_parameters())
            for name in before:
                setattr(found.layer, name, nn.Parameter(read(f"{found.name}.{name}"), requires_grad=False))
            try:
                yield
            finally:
                for name, empty_one in before.items():
                    setattr(found.layer, name, empty_one)
                trim(0)  # glibc keeps what is freed between blocks that stay, and asks for more

        def put(parent: nn.Module, name: str, layer: nn.Module) -> None:
            parent._modules[name] = layer

        quantize_model(module, anatomy.component, method, put, present, report, weights=weights)
        quantized = {name for name, part in module.named_modules() if isinstance(part, QLayer)}
        left = [name for name in needed if name in shards.names and name.rpartition(".")[0] not in quantized]
        module.load_state_dict({name: read(name) for name in left}, strict=False, assign=True)
    module.to(device)  # buffers that no file holds
    Standing(method.model_dump(mode="json"), present).attach(module)
    return module.eval().requires_grad_(False)


def _malloc_trim() -> Callable[[int], Any]:
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return found or (lambda _: None)
