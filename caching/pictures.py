"""The pictures of a batch, for methods that decide for each of them: a picture does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.batches import Batches, is_plain, is_table

from .reading import peak
from .region import Memory


@dataclass(frozen=True)
class Pictures:
    """`count` pictures in a batch of `rows`, a multiple of it: the halves of guidance lie one behind the other, so that
    row r is of picture r % count. A tensor may have several rows for each of these (frames), next to each other."""

    rows: int
    count: int

    def fits(self, leaf: Tensor) -> bool:
        return leaf.ndim > 0 and len(leaf) > 0 and len(leaf) % self.rows == 0

    def of(self, own: Any, chosen: Sequence[int]) -> Any:
        """The rows of some pictures, of a tensor or a list, in the batch's order and in memory of their own."""
        each = len(own) // self.rows
        parts = [own[row * each : (row + 1) * each] for row in range(self.rows) if row % self.count in chosen]
        return torch.cat(parts) if isinstance(own, Tensor) else [entry for part in parts for entry in part]

    def one(self, leaves: Sequence[Any], picture: int) -> list[Any]:
        """A picture's part of some leaves."""
        return [self.of(leaf, [picture]) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def joined(self, pictures: Sequence[Sequence[Any]]) -> list[Any]:
        """The leaves of the batch, of those of each picture: the inverse of `one`."""
        halves, out = self.rows // self.count, []
        for column in zip(*pictures, strict=True):
            if isinstance(column[0], Tensor):
                parts = [leaf.chunk(halves) for leaf in column]
                out.append(torch.cat([part[half] for half in range(halves) for part in parts]))
            else:
                out.append(column[0])
        return out

    def spread(self, leaves: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
        """The leaves of the batch, of those of some pictures; zeros stand for the others."""
        some = self.only(chosen)
        known = {picture: some.one(leaves, place) for place, picture in enumerate(chosen)}
        nothing = [torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in known[chosen[0]]]
        return self.joined([known.get(picture, nothing) for picture in range(self.count)])

    def only(self, chosen: Sequence[int]) -> Pictures:
        """A batch of some of the pictures."""
        return Pictures(self.rows // self.count * len(chosen), len(chosen))


def divide(memory: Memory, pictures: Pictures) -> None:
    """From now on each picture has a memory of its own, in `parts`; where it is known which rows are whose."""
    kept = [leaf for value in memory.values for leaf in value] + [*memory.probes, memory.probe, memory.previous]
    if pictures.count < 2 or not all(pictures.fits(leaf) for leaf in kept if isinstance(leaf, Tensor)):
        return
    for picture in range(pictures.count):
        values = [pictures.one(value, picture) for value in memory.values]
        part = Memory(
            indices=[*memory.indices], values=values, probes=pictures.one(memory.probes, picture), at=memory.at,
            peaks=[peak(value) for value in values] if memory.peaks else [], drift=memory.drift, change=memory.change,
            cached_in_row=memory.cached_in_row, cached=memory.cached,
        )  # fmt: skip
        (part.previous,) = pictures.one([memory.previous], picture)
        memory.parts.append(part)
    memory.pictures, memory.values = pictures, []


def run_some(
    pictures: Pictures, chosen: Sequence[int], batches: Batches, forward: Callable[..., Any], args: tuple, kwargs: dict
) -> tuple[Any, str | None]:
    """What a module gives for the rows of some pictures, with anything for the others; or for all, and why."""
    given = batches.named(args, kwargs)
    why = batches.unknown(args, kwargs)
    for name, value in given.items():  # places that each image has of its own
        leaves = pytree.tree_leaves(value) if is_table(name) else []
        if any(isinstance(leaf, Tensor) and leaf.ndim and pictures.fits(leaf) for leaf in leaves):
            why = why or name
    if why is None and not batches.size(args, kwargs) % pictures.rows:
        own, options = batches.change(args, kwargs, lambda rows: pictures.of(rows, chosen))
        output = forward(*own, **options)
        leaves, form = pytree.tree_flatten(output)
        some = pictures.only(chosen)
        if all(some.fits(leaf) if isinstance(leaf, Tensor) else is_plain(leaf) for leaf in leaves):
            return pytree.tree_unflatten(pictures.spread(leaves, chosen), form), None
        why = "its output"
    return forward(*args, **kwargs), why or batches.names[0]
