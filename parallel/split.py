"""One denoiser whose work is split over the patch axis: what its layers ask while it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step, StepClock
from fastdiff.errors import UnsupportedModel

from .bus import Bus
from .exchange import Bundle, Exchange
from .opaque import Talk

if TYPE_CHECKING:
    from .base import ParallelMethod

Forward = Callable[..., Any]


class Split:
    """The state that the rules of layers share. `active` only inside a call of what is split.

    `begin`, `end` of each patch rank are in `parts`: rows of the latents, or tokens of a transformer.
    """

    def __init__(self, method: ParallelMethod, bus: Bus, clock: StepClock | None) -> None:
        self.method, self.bus, self.clock = method, bus, clock
        self.ranks = bus.topology.group("patch")
        self.place = bus.topology.place("patch")
        self.active, self.fresh = False, True
        self.bordered: nn.Module | None = None  # whose input, which comes next, has rows of the neighbours
        self.step: Step | None = None
        self.parts: list[tuple[int, int]] = []
        self.width = 1  # columns of the latents, or tokens in a row
        self.shape: tuple[int, ...] = ()  # of what is split: the latents, or the tokens of all ranks
        self.exchanges: list[Exchange] = []
        self._bundles: dict[str, Bundle] = {}
        self.latents: dict[str, Any] = {}  # what the denoiser was given, by name
        self._forget: list[Callable[[], None]] = []
        self._ruled: dict[tuple[int, str], nn.Module] = {}
        self._looked = False
        self.root: nn.Module | None = None
        if clock is not None:
            clock.on_start.append(self._start)
            clock.on_end.append(self._end)

    @property
    def peers(self) -> list[int]:
        return [rank for rank in self.ranks if rank != self.bus.topology.rank]

    def neighbour(self, offset: int) -> int | None:
        """The rank whose patch is next to ours: -1 above, 1 below; None at the edge of the picture."""
        place = self.place + offset
        return self.ranks[place] if 0 <= place < len(self.ranks) else None

    def exchange(self, layer: str, kind: str) -> Exchange:
        small = kind != "kv"
        bundle = self._bundles.setdefault(kind, Bundle(self.bus, kind)) if small else None
        made = Exchange(self.bus, layer, kind, "raw" if small else self.method.codec, bundle)
        made.waits = self.method.waits(layer) or None
        self.exchanges.append(made)
        return made

    def note(self, text: str) -> None:
        """What a user should know of this run."""
        for callback in self.clock.on_note if self.clock is not None else ():
            callback(text)

    def belongs_to(self, anatomy: Anatomy) -> None:
        """All layers are ruled. Raises BadConfig where the method's settings name one that is not here."""
        self.method.check_layers(anatomy, [one.layer for one in self.exchanges])
        self.root = anatomy.denoiser
        self.bus.splits.append(self)

    def hidden(self, layer: Talk) -> Talk:
        """A layer that talks to other ranks, as a graph may hold it."""
        return layer if self.bus.opaque is None else self.bus.opaque.hidden(layer)

    def swap(
        self, exchange: Exchange, sends: dict[int, Tensor], shapes: dict[int, tuple[int, ...]], dtype: torch.dtype,
        whole: bool = True,
    ) -> dict[int, Tensor]:  # fmt: skip
        """`whole`: whether all that a rank has is shown, or a part; the same on all ranks."""
        if self.bordered is not None:  # rows of the neighbours are still among our own
            raise UnsupportedModel(
                f"a {type(self.bordered).__name__} does not read what the normalization before it gives; "
                "parallel.method = distrifusion with many warmup_steps computes the same"
            )
        alike = (self.shape, dtype, whole)
        last = self.method.last(self.step.run.total) if self.step is not None else None
        fresh = self.fresh if exchange.waits is None else exchange.waits
        return exchange.swap(sends, shapes, dtype, self.step, fresh, self.method.max_age, alike, last)

    def whole(self, own: Tensor, dim: int, what: str = "the output") -> Tensor:
        """What all ranks have of a tensor, put together along the dimension that is split, in units of `parts`."""
        begin, end = self.parts[self.place]
        factor, shape = own.shape[dim] // (end - begin), list(own.shape)
        shapes = [[*shape[:dim], (end - begin) * factor, *shape[dim:][1:]] for begin, end in self.parts]
        return torch.cat(self.bus.gather("output", what, own, "patch", shapes), dim)

    def once(self, module: nn.Module, rule: str) -> bool:
        """Whether a rule is not on a module yet; from now on it is."""
        new = (id(module), rule) not in self._ruled
        self._ruled[id(module), rule] = module
        return new

    def rules(self, look: Callable[[], None]) -> None:
        """Once a run, look for layers that came later: those of a LoRA."""
        if not self._looked:
            look()
        self._looked = True

    def at_reset(self, forget: Callable[[], None]) -> None:
        self._forget.append(forget)

    def enter(self) -> None:
        self.step = self.clock.now if self.clock is not None else None
        self.fresh = self.step is None or self.method.fresh(self.step.index, self.step.run.total)
        self.active = True

    def leave(self) -> None:
        self.active, self.bordered = False, None

    def flush(self) -> None:
        """A call ends: what is left in bundles leaves."""
        for bundle in self._bundles.values():
            bundle.flush()
        self.bus.turn()

    def _start(self, run: Run) -> None:
        self._looked = False
        for forget in self._forget:
            forget()

    def _end(self, run: Run) -> None:
        """What is still under way is taken in where all ranks ended the run; else the groups are closed, see Crew."""
        assert self.clock is not None
        whole = self.clock.index >= run.total and not self.bus.alone
        for exchange in self.exchanges:
            exchange.reset() if whole else exchange.forget()
        if not whole:
            self._bundles = {kind: Bundle(self.bus, kind) for kind in self._bundles}
            for exchange in self.exchanges:
                exchange.bundle = self._bundles.get(exchange.kind)


def around(
    split: Split, forward: Forward, change: Callable[[tuple, dict], tuple[tuple, dict]], after: Forward | None = None
) -> Forward:
    """A forward with other arguments, inside `split`; `after`, if given, makes the tensors it returns whole again."""

    @wraps(forward)
    def split_forward(*args: Any, **kwargs: Any) -> Any:
        outside = split.clock is not None and split.clock.now is None  # another pipeline's call, or an untold one
        if split.bus.alone or outside:
            return forward(*args, **kwargs)
        args, kwargs = change(args, kwargs)
        split.enter()
        try:
            output = forward(*args, **kwargs)
        finally:
            split.leave()
        if after is not None:
            output = pytree.tree_map_only(Tensor, after, output)
        split.flush()  # not before: what everyone waits for would queue behind it
        return output

    return split_forward
