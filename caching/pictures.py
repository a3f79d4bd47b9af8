"""The pictures of a batch, for methods that decide for each of them: a picture does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.batches import Batches, is_plain, is_table
from fastdiff.recorder import Recorder

from .reading import Together, peak
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


def each(memory: Memory) -> list[Memory]:
    """The memories of all visits of a region in a call, and of all pictures where these have their own."""
    return [own for visit in (memory, *memory.again) for own in (visit.parts or (visit,))]


def parts_of(memory: Memory, rows: int, count: int) -> list[Memory]:
    """The memories of the pictures in a batch of `rows`, of which the solver is given `count`, each with its probe; the
    one memory of all of them where it is not known, or not yet, which rows are whose."""
    if not memory.parts and memory.values and count > 1 and rows >= count and rows % count == 0:
        _divide(memory, Pictures(rows, count))
    for picture, part in enumerate(memory.parts):
        (part.probe,) = memory.pictures.one([memory.probe], picture)
    return memory.parts or [memory]


def _divide(memory: Memory, pictures: Pictures) -> None:
    kept = [leaf for value in memory.values for leaf in value] + [*memory.probes, memory.probe, memory.previous]
    if not all(pictures.fits(leaf) for leaf in kept if isinstance(leaf, Tensor)):
        return
    peaks = Together()
    for picture in range(pictures.count):
        values = [pictures.one(value, picture) for value in memory.values]
        part = Memory(
            indices=[*memory.indices], values=values, probes=pictures.one(memory.probes, picture), at=memory.at,
            peaks=[peaks.add(peak(value)) for value in values] if memory.peaks else [], drift=memory.drift,
            change=memory.change, cached_in_row=memory.cached_in_row, cached=memory.cached,
        )  # fmt: skip
        (part.previous,) = pictures.one([memory.previous], picture)
        memory.parts.append(part)
    peaks.leave()
    memory.pictures, memory.values = pictures, []


def settle(memory: Memory, branch: int, recorder: Recorder) -> None:
    """All pictures have decided."""
    memory.chosen = [picture for picture, part in enumerate(memory.parts) if not part.skipping]
    memory.skipping, memory.keep = not memory.chosen, bool(memory.chosen)
    recorder.pictures(branch, memory.chosen, len(memory.parts))


def assembled(
    memory: Memory, leaves: list[Any], entries: list[Any], served: Callable[[Memory, list[Any]], list[Any]]
) -> list[Any]:  # fmt: skip
    """The leaves that leave a region, of `leaves` for the chosen pictures and of what is remembered of the others.

    entries: what entered the region. served: the leaves of one picture, of its memory and its part of the entries.
    """
    if not memory.parts:
        return served(memory, entries)
    pictures: Pictures = memory.pictures
    return pictures.joined([
        served(part, pictures.one(entries, k)) if part.skipping else pictures.one(leaves, k)
        for k, part in enumerate(memory.parts)
    ])  # fmt: skip


def run_some(
    memory: Memory, batches: Batches, recorder: Recorder, undivided: str | None, forward: Callable[..., Any],
    args: tuple, kwargs: dict,
) -> Any:  # fmt: skip
    """What a module gives for the rows of the chosen pictures, with anything for the others.

    All rows run where `undivided` says why, or nobody knows what holds the batch; the report is told.
    """
    why = undivided
    if why is None:
        unknown = _unknown(memory.pictures, batches, args, kwargs)
        if unknown is None:
            own, options = batches.change(args, kwargs, lambda rows: memory.pictures.of(rows, memory.chosen))
            output = forward(*own, **options)
            leaves, form = pytree.tree_flatten(output)
            some = memory.pictures.only(memory.chosen)
            if all(some.fits(leaf) if isinstance(leaf, Tensor) else is_plain(leaf) for leaf in leaves):
                return pytree.tree_unflatten(memory.pictures.spread(leaves, memory.chosen), form)
        why = f"it is not known how {unknown or 'an output'} holds the batch"
    recorder.note(f"pictures of the batch that the cache could leave out ran with the others: {why}")
    return forward(*args, **kwargs)


def _unknown(pictures: Pictures, batches: Batches, args: tuple, kwargs: dict) -> str | None:
    """The first argument of a module of which it is not known how it holds the batch."""
    for name, value in batches.named(args, kwargs).items():
        leaves = pytree.tree_leaves(value) if is_table(name) else []
        if any(isinstance(leaf, Tensor) and pictures.fits(leaf) for leaf in leaves):
            return name  # places that each image may have of its own
    known = batches.unknown(args, kwargs)
    return batches.names[0] if known is None and batches.size(args, kwargs) % pictures.rows else known
