"""What is cached: modules that a cached step leaves out, and the value it puts in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Probe:
    """A tensor for a dynamic policy: `read(inputs by name, output)` of a live module; where `module` is None of the
    region's own inputs, where it is the denoiser of that one's (the output is None then)."""

    read: Callable[[dict[str, Any], Any], Tensor]
    module: nn.Module | None = None


@dataclass(frozen=True)
class Region:
    """Modules in call order; the last one's output is what the rest of the denoiser needs.

    store: "output" keeps that output; "residual" keeps it minus what entered the region, stream by stream
    (`takes` of the first module, `returns` of the last). kind: what it is, for methods that treat kinds apart.
    hides_control: whether a cached step has no use for what a ControlNet says.
    """

    name: str
    units: tuple[nn.Module, ...]
    store: Literal["output", "residual"] = "output"
    takes: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    probe: Probe | None = None
    kind: str = ""
    hides_control: bool = False


@dataclass
class Memory:
    """What one branch of one run remembers of a region.

    `indices`, `values`, `probes` and `peaks` are of the newest computed steps; `previous` is the probe of `at`, the
    step before, computed or not; `drift` what an accumulating policy has gathered since the last computed step;
    `placeholders` what each module of the region gives where it is left out. `passed` counts its modules that were
    called so far in the present call, `broken` says that one was passed over. `parts` are of single `pictures`, where
    a dynamic method decides for each, and `chosen` those that the present call computes.
    """

    indices: list[int] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)
    peaks: list[Callable[[], float]] = field(default_factory=list)
    placeholders: list[Any] = field(default_factory=list)
    spec: Any = None
    entry: list[Tensor] = field(default_factory=list)
    probe: Tensor | None = None
    previous: Tensor | None = None
    at: int = 0
    drift: Tensor | float = 0.0
    change: Callable[[], float] | None = None
    visits: int = 0
    again: list[Memory] = field(default_factory=list)
    cached_in_row: int = 0
    cached: int = 0
    skipping: bool = False
    shadowed: bool = False
    keep: bool = True
    factors: Sequence[float] = ()
    passed: int = 0
    broken: bool = False
    taken: list[Any] | None = None
    ready: list[Any] | None = None
    pictures: Any = None
    parts: list[Memory] = field(default_factory=list)
    chosen: Sequence[int] = ()

    def passes(self, position: int) -> bool:
        """A module of the region is called: whether all before it were, too. What follows a gap runs as it is."""
        self.broken |= position != self.passed
        self.passed += 1
        return not self.broken

    @property
    def partial(self) -> bool:
        """Whether the present call computes some pictures only."""
        return 0 < len(self.chosen) < len(self.parts)

    @property
    def torn(self) -> bool:
        """Whether some modules of the region were called, and some not."""
        return self.broken or 0 < self.passed < len(self.placeholders)


def tensors(leaves: Sequence[Any]) -> list[Tensor]:
    """The tensors among some leaves; a last block may return None for a stream that ends."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def owned(leaves: Sequence[Any]) -> list[Any]:
    """Values that nobody else can write into, and that keep no graph alive."""
    return [copied(leaf) for leaf in leaves]


def placeholder(output: Any) -> Any:
    """What `unread` needs to know of an output: shapes, types and places, no tensors."""
    leaves, form = pytree.tree_flatten(output)
    return [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form


def unread(known: Any) -> Any:
    """Fresh memory for outputs that nobody reads, but that some models write into (FreeU, T2I adapters)."""
    told, form = known
    leaves = [torch.empty(x[0], dtype=x[1], device=x[2]) if isinstance(x, tuple) else x for x in told]
    return pytree.tree_unflatten(leaves, form)


def signature(args: tuple, kwargs: dict) -> Any:
    """Shape, dtype and device of the tensors that a call is given; a change makes what is remembered useless."""
    return [(t.shape, t.dtype, t.device) for t in tensors(pytree.tree_leaves((args, kwargs)))]


def wants_gradients(args: tuple, kwargs: dict) -> bool:
    """Whether somebody wants gradients of what a call is given."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors(pytree.tree_leaves((args, kwargs))))


def entries_of(region: Region, memory: Memory) -> list[Any]:
    """What entered the streams that leave a region, in their order; nothing where its output is kept as it is."""
    entry = dict(zip(region.takes, memory.entry, strict=True))
    return [entry[stream] for stream in region.returns]
