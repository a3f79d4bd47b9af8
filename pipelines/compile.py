"""torch.compile, of the repeated blocks (one graph for all of a kind) or of the whole denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Gated
from fastdiff.caching.session import Session
from fastdiff.caching.sites import attention_layers
from fastdiff.caching.unet import LAYER_PARTS
from fastdiff.config import Compile
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.patch import PatchSet

_REPLAYED = ("reduce-overhead", "max-autotune")  # modes that record CUDA graphs


def check_cache(session: Session, settings: Compile) -> None:
    """Raises BadConfig where the cache would decide, or put something in a module's place, inside a graph."""
    method, denoiser = session.method, session.anatomy.denoiser
    inside = any(region.units != (denoiser,) for region in session.regions)
    if settings.scope == "denoiser":
        if inside and (isinstance(method, Gated) or method.predicts_inside):
            does = "decides" if isinstance(method, Gated) else "makes predictions"
            raise BadConfig(
                f"{method.method} {does} inside the denoiser, all of which compile.scope = denoiser turns into one "
                "graph; set compile.scope = blocks"
            )
        return
    hidden = {layer for block in repeated(session.anatomy) for layer in block.modules() if layer is not block}
    if any(unit in hidden for region in session.regions for unit in region.units):
        raise BadConfig(
            f"{method.method} leaves out layers inside the blocks that compile.scope = blocks compiles; "
            "set compile.scope = denoiser"
        )


def compile_blocks(anatomy: Anatomy, settings: Compile, patches: PatchSet) -> None:
    """Compile each block's forward; installed before the cache, so that its decisions stay outside the graphs.

    Blocks of one class and with weights of the same shapes share their graphs. A UNet has more kinds of layers than
    torch keeps graphs for one function.
    """
    of_a_kind: dict[Any, Callable[..., Any]] = {}

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        function, block = getattr(forward, "__func__", None), getattr(forward, "__self__", None)
        if function is None or not isinstance(block, nn.Module):  # somebody patched this one block
            return _compiled(forward, settings)
        kind = (function, *((name, weight.shape) for name, weight in block.named_parameters()))
        if kind not in of_a_kind:
            of_a_kind[kind] = _compiled(function, settings)
        return partial(of_a_kind[kind], block)

    for block in repeated(anatomy):
        patches.wrap_forward(block, wrapper)


def compile_denoiser(anatomy: Anatomy, settings: Compile, patches: PatchSet) -> None:
    """Compile the denoiser's forward with what the cache patched inside it: one graph of a computed step, one of a
    cached step. Which of them runs is decided outside, before it is entered."""
    patches.wrap_forward(anatomy.denoiser, partial(_compiled, settings=settings))


def _compiled(forward: Callable[..., Any], settings: Compile) -> Callable[..., Any]:
    mode = settings.mode if settings.backend == "inductor" else None
    compiled = torch.compile(
        _apart(forward), backend=settings.backend, mode=mode, fullgraph=settings.fullgraph, dynamic=settings.dynamic
    )
    if mode not in _REPLAYED:
        return compiled

    def copied(*args: Any, **kwargs: Any) -> Any:
        """The next replay writes over what a CUDA graph gave."""
        return pytree.tree_map_only(Tensor, torch.clone, compiled(*args, **kwargs))

    return copied


def _apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward with code of its own. torch keeps graphs, counts them, and remembers which sizes vary by code
    object, which all instances of a class share: another pipeline, or an earlier setting, would be mixed in."""

    def entered(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    code = entered.__code__.replace(co_name=f"entered_{uuid4().hex}")
    return FunctionType(code, entered.__globals__, code.co_name, None, entered.__closure__)


def repeated(anatomy: Anatomy) -> list[nn.Module]:
    """The modules that make up most of a denoiser's work, of which there are many of a kind.

    A UNet's layers; of a transformer every list of modules that attend, whether the family describes it or not.
    """
    if anatomy.family.kind == "language":
        name = anatomy.family.name
        raise UnsupportedModel(f"the blocks of a {name} model are not known; set compile.scope = denoiser")
    if anatomy.family.kind == "transformer":
        return list(_attending(anatomy.denoiser))
    unet: Any = anatomy.denoiser
    blocks = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    parts = [getattr(block, name, None) or () for block in blocks for name in LAYER_PARTS]
    return [layer for part in parts for layer in part if layer is not None]


def _attending(root: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of modules that hold attention layers."""
    for child in root.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(attention_layers(block) for block in child):
            yield from child
        else:
            yield from _attending(child)
