"""Denoisers of a directory of which each rank reads its shares of the blocks, and all else, straight from the files."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from fastdiff.anatomy import Anatomy, recognise
from fastdiff.config import Config
from fastdiff.errors import UnsupportedModel
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.bus import Bus
from fastdiff.parallel.kept import Kept
from fastdiff.parallel.mesh import Topology, join
from fastdiff.parallel.portions import Portion, Rows, read_blocks
from fastdiff.parallel.shards import Peers, share_out, units

from .families import FAMILIES
from .quantized_parts import Pieces, is_quantized, load_components, type_of
from .single_files import is_file
from .sources import first_line
from .stored import Stored, stored, variant
from .streamed import DENOISERS, structures

WHOLE = "each rank reads the whole model, and keeps its share then: "
_SAMPLE = 16  # values of a tensor that tell whether two ranks read the same model


def asked(parallel: Any, because: str | None) -> ParallelMethod | None:
    """The parallel method of a config's table, or of a name, where it lets ranks read shares, and nothing speaks
    against it, which a warning says. Raises BadConfig."""
    method: Any = Config(parallel=parallel).parallel
    if method is None or not method.shard:
        return None
    if because is not None:
        warnings.warn(WHOLE + because, stacklevel=3)
    return None if because else method


def obstacle(model: str, quantizes: bool, offload: str) -> str | None:
    """What of an order to load speaks against reading shares, whatever the model is."""
    found = {
        "it is quantized while it is read, or once it is": quantizes,
        f"offload = {offload} moves weights of its own": offload != "none",
        "it is a single file": is_file(model),
    }
    return next((reason for reason, holds in found.items() if holds), None)


def parts(folder: Path, method: ParallelMethod, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The denoisers of a directory with this rank's shares; {} where it has to be read whole, which a warning says.

    Raises BadConfig where this process is no rank of the method's.
    """
    target = torch.device(device)
    rank = join(method.devices, target, method.timeout)
    mesh = method.topology(dist.get_world_size(), rank)
    try:
        if is_quantized(folder):
            return _quantized(folder, mesh, dtype, target)
        found = readable(folder, dtype)
    except UnsupportedModel as error:
        warnings.warn(WHOLE + str(error), stacklevel=3)
        return {}
    return {anatomy.component: read(anatomy, there, mesh, dtype, target) for anatomy, there in found}


def empties(folder: Path, dtype: torch.dtype) -> list[Anatomy]:
    """The denoisers of a directory without weights, made with a default type as diffusers does it: buffers that no file
    holds are of that type. Raises UnsupportedModel for what is none of a known library, or broken."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return structures(folder)
    except Exception as error:  # whatever classes of others raise for their configuration
        raise UnsupportedModel(f"its structure cannot be told: {first_line(error)}") from error
    finally:
        torch.set_default_dtype(before)


def readable(folder: Path, dtype: torch.dtype) -> list[tuple[Anatomy, dict[str, Stored]]]:
    """The denoisers of a pipeline's directory without weights, in the types that they will have, and what files hold.

    Raises UnsupportedModel with the reason where one cannot be read in parts.
    """
    told = []
    for anatomy in empties(folder, dtype):
        module: Any = anatomy.denoiser
        there = stored(folder / anatomy.component, variant(folder))
        if not isinstance(anatomy.denoiser, ModelMixin) or "quantization_config" in module.config:
            raise UnsupportedModel(f"its {anatomy.component} is read by another library")
        units(anatomy)  # it has blocks
        for part, name, path, tensor in _parameters(module):
            if path not in there or there[path].shape != tuple(tensor.shape):
                raise UnsupportedModel(f"{path} of its {anatomy.component} is not in the files as the model has it")
            if tensor.is_floating_point():
                like = torch.empty_like(tensor, dtype=type_of(path, module, dtype))
                part._parameters[name] = nn.Parameter(like, requires_grad=tensor.requires_grad)
        told.append((anatomy, there))
    return told


def _quantized(folder: Path, mesh: Topology, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """The components of a quantized directory. Layers are packed when all of one is here: a block is read as a whole,
    and this rank's share of it kept."""
    kept: dict[str, list[Kept]] = {}
    keeper = Peers(Bus(mesh, 1.0))

    def away(name: str, module: nn.Module, number: int, block: nn.Module) -> None:
        kept[name].append(share_out(number, block.to(device), module, keeper, device))

    def cut(name: str, module: nn.Module) -> Pieces:
        if name not in DENOISERS:
            return ()
        names, kept[name] = {id(part): f"{path}." for path, part in module.named_modules()}, []
        blocks = enumerate(units(recognise(module, name, FAMILIES)))
        return [(names[id(block)], partial(away, name, module, number, block)) for number, block in blocks]

    parts = load_components(folder, dtype, cut)
    for name, own in kept.items():
        there = stored(folder / name, variant(folder))
        Portion(mesh.rank, mesh.size, own, _digest(sorted(there), partial(_rows, there))).attach(parts[name].to(device))
    return parts


def _rows(there: Mapping[str, Stored], name: str, begin: int, end: int) -> Tensor:
    # Opened anew each time: pages of a file that stays mapped are memory that this rank holds.
    with safe_open(there[name].file, framework="pt") as opened:
        return opened.get_slice(name)[begin:end] if there[name].shape else opened.get_tensor(name)


def _digest(names: Iterable[str], rows: Rows) -> int:
    digest = 0
    for name in names:
        some = rows(name, 0, 1).flatten()
        digest = zlib.crc32(some[:: max(1, len(some) // _SAMPLE)].double().numpy().tobytes(), digest)
    return digest


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, str, Tensor]]:
    """Each place of a parameter: the module, its name there, and that in the file."""
    return [
        (part, name, f"{path}.{name}".lstrip("."), tensor)
        for path, part in module.named_modules()
        for name, tensor in part._parameters.items()
        if tensor is not None
    ]


def read(
    anatomy: Anatomy, there: Mapping[str, Stored], mesh: Topology, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A denoiser that is `readable`, on the device, with one rank's shares of its blocks."""
    module: Any = anatomy.denoiser
    parameters, own = {path for *_, path, _ in _parameters(module)}, module.state_dict().keys()

    def rows(name: str, begin: int, end: int) -> Tensor:
        found = _rows(there, name, begin, end)
        return found.to(type_of(name, module, dtype)) if found.is_floating_point() else found

    kept = read_blocks(units(anatomy), module, mesh.rank, mesh.size, device, rows)
    for part, name, path, tensor in _parameters(module):
        if tensor.is_meta:
            whole = rows(path, 0, len(tensor) if tensor.ndim else 1).clone().to(device)
            part._parameters[name] = nn.Parameter(whole, requires_grad=tensor.requires_grad)
    buffers = {name: rows(name, 0, (*there[name].shape, 1)[0]).clone() for name in own - parameters if name in there}
    module.load_state_dict(buffers, strict=False, assign=True)
    Portion(mesh.rank, mesh.size, kept, _digest(sorted(parameters), rows)).attach(module)
    module.to(device)  # buffers that no file holds
    return module.eval()
