"""Whether a module's weights are here, and plain numbers: asked before anybody reads or replaces them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModel

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_TINY = 1  # bytes of the numbers that weights are cast to for storage, which nothing computes with
_OWN = "quantized_as"  # what a layer says that fastdiff quantized
_QUANTIZERS = {
    "torchao", "optimum", "bitsandbytes", "gguf", "hqq", "gptqmodel", "auto_gptq", "awq", "compressed_tensors",
    "nunchaku", "sdnq",
}  # fmt: skip


def require(module: nn.Module, name: str) -> None:
    """Raises UnsupportedModel where weights of the module, called `name` in the message, cannot be read."""
    reason = absent(module)
    if reason is not None:
        raise UnsupportedModel(
            f"the weights of {name} {reason}; do this with the plain model in memory, and enable that afterwards"
        )


def absent(module: nn.Module) -> str | None:
    """Why some weights cannot be read: another place has them, or numbers that stand for them; None if all are here."""
    for part in module.modules():
        for hook in hooks(part):
            if getattr(getattr(hook, "group", None), "offload_to_disk_path", None):
                return "are on disk (group offloading), and what memory holds is no weight"
            if hasattr(hook, "storage_dtype") and hasattr(hook, "compute_dtype"):
                return f"are kept as {_dtype(hook.storage_dtype)} between calls (layerwise casting)"
            if getattr(hook, "offload", False):
                return "are loaded one layer at a time (sequential offloading)"
        for tensor in tensors(part):
            if tensor.is_meta:
                return "are not loaded: some are on the meta device"
            least = min(tensor.nbytes, 2 * tensor.itemsize)  # one number may stand for all
            if type(tensor) in _PLAIN and tensor.untyped_storage().nbytes() < least:
                return "are sharded: some are empty here"
    return None


def foreign(module: nn.Module) -> str | None:
    """By what another library quantized a module, as its weights and layers tell; None where all are plain numbers."""
    for part in module.modules():
        if hasattr(part, _OWN):
            continue
        if (library := _library(type(part))) is not None:
            return f"by {library} ({type(part).__name__} layers)"
        for tensor in part._parameters.values():
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN:
                said = _library(type(tensor)) or type(tensor).__module__.split(".")[0]
                return f"by {said} (its weights are {type(tensor).__name__})"
            if tensor.ndim >= 2 and (not tensor.is_floating_point() or tensor.itemsize <= _TINY):
                return f"to {_dtype(tensor.dtype)} numbers"
    return None


def hooks(module: nn.Module) -> Iterator[Any]:
    """Those that accelerate and diffusers put on this very module."""
    one = vars(module).get("_hf_hook")
    if one is not None:
        yield from getattr(one, "hooks", (one,))
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield from registry.hooks.values()


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of this very module."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _library(kind: type) -> str | None:
    """The quantizing library that a class comes from: its own package, or one that Hugging Face wraps."""
    places = kind.__module__.split(".")
    if places[0] in _QUANTIZERS:
        return places[1] if places[0] == "optimum" and len(places) > 1 else places[0]
    if places[0] in ("diffusers", "transformers") and "quantizers" in places[:-1]:
        return places[places.index("quantizers") + 1]
    return None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
