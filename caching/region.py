"""What is cached: modules that a cached step leaves out, and the value it puts in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Probe:
    """A tensor read off a live module's forward, for a dynamic policy."""

    module: nn.Module
    read: Callable[[dict[str, Any], Any], Tensor]


@dataclass(frozen=True)
class Region:
    """Modules in call order; the last one's output is what the rest of the denoiser needs.

    store: "output" keeps that output; "residual" keeps it minus what entered the region, stream by stream
    (`takes` of the first module, `returns` of the last).
    """

    name: str
    units: tuple[nn.Module, ...]
    store: Literal["output", "residual"] = "output"
    takes: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    probe: Probe | None = None


@dataclass
class Memory:
    """What one branch of one run remembers of a region."""

    indices: list[int] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)
    placeholders: dict[int, Any] = field(default_factory=dict)
    shape: Any = None
    spec: Any = None
    entry: list[Tensor] = field(default_factory=list)
    probe: Tensor | None = None
    last_probe: Tensor | None = None
    cached_in_row: int = 0
    skipping: bool = False
    keep: bool = True

    def forget(self) -> None:
        self.indices.clear()
        self.values.clear()
        self.last_probe = None


def named(module: nn.Module) -> Callable[[tuple, dict], dict[str, Any]]:
    """Turns the arguments of a module's forward into a dict by name."""
    order = list(inspect.signature(type(module).forward).parameters)[1:]

    def by_name(args: tuple, kwargs: dict) -> dict[str, Any]:
        return dict(zip(order, args, strict=False)) | kwargs

    return by_name


def placeholder(output: Any) -> Any:
    """The same structure with one-element tensors expanded to the same shapes: what `unread` needs to know."""

    def empty(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)

    return pytree.tree_map(empty, output)


def unread(form: Any) -> Any:
    """Fresh memory for outputs that nobody reads, but that some models write into (FreeU, T2I adapters)."""
    return pytree.tree_map_only(Tensor, torch.empty_like, form)


def signature(args: tuple, kwargs: dict) -> Any:
    """Shape, dtype and device of the tensors that enter a region; a change makes what is remembered useless."""
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return [(t.shape, t.dtype, t.device) for t in leaves]
