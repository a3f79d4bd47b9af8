"""Where the batch is in what enters and leaves the modules of a region: learned from two calls, never told by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.batches import is_plain

from .region import placeholder, unread


class Unclear(Exception):
    """Where the batch is cannot be told."""


@dataclass
class Seam:
    """One module: shapes of its inputs in a call of one step (None for what is no tensor), and what it gave.

    `dims` are the dimensions that the steps are in, input by input, None for those that do not hold them; `leaving` the
    one of all outputs.
    """

    shapes: list[torch.Size | None]
    gave: Any
    dims: list[int | None] | None = None
    leaving: int = 0


class Seams:
    """Learned where a denoiser is called once with one step and once with several, all else alike.

    An input whose shape is the same in both calls has no part in the batch; one that is larger in one dimension only,
    as many times as there are more steps, has the batch there. Nothing else counts as known.
    """

    def __init__(self, asked: Any) -> None:
        self.asked = asked  # signature of the denoiser's call
        self._known: dict[nn.Module, Seam] = {}
        self._twice = False
        self._divisible = True  # whether the present step's part of every input is known

    def restart(self) -> None:
        """A call of one step begins that is to show all modules."""
        self._known, self._twice = {}, False

    def first_call(self, unit: nn.Module, given: Any, output: Any) -> None:
        """What entered and left a module in the call of one step."""
        self._twice = self._twice or unit in self._known  # of a module that runs twice we know no place
        self._known[unit] = Seam(_shapes(given), placeholder(output))

    def shown(self, units: list[nn.Module]) -> bool:
        """Whether the call of one step has shown each of these modules, once."""
        return not self._twice and all(unit in self._known for unit in units)

    def joins(self, units: list[nn.Module]) -> bool:
        """Whether it is known how what these modules give for each step is put together."""
        return self.shown(units) and all(self._known[unit].dims is not None for unit in units)

    def divides(self, units: list[nn.Module]) -> bool:
        """Whether these modules can be given the first step's part of all that enters them, too."""
        return self.joins(units) and self._divisible

    def compare(self, unit: nn.Module, given: Any, count: int) -> None:
        """Learn from a call of `count` steps. Raises Unclear where not even the outputs are known."""
        seam = self._known[unit]
        leaves, larger = pytree.tree_leaves(given), _shapes(given)
        self._divisible = self._divisible and len(larger) == len(seam.shapes) and all(map(_clear, leaves))
        dims: list[int | None] = []
        for one, many in zip(seam.shapes, larger, strict=False):
            found = _enlarged(one, many, count) if one is not None and many is not None else []
            self._divisible = self._divisible and (one == many or len(found) == 1)
            dims.append(found[0] if len(found) == 1 else None)
        seam.dims = dims
        places = {dim for dim in dims if dim is not None}
        if len(places) != 1:
            raise Unclear
        (seam.leaving,) = places
        rows = {shape[seam.leaving] for shape, dim in zip(seam.shapes, dims, strict=False) if shape and dim is not None}
        left = [told[0] for told in seam.gave[0] if isinstance(told, tuple)]
        if any(len(shape) <= seam.leaving or shape[seam.leaving] not in rows for shape in left):
            raise Unclear

    def own(self, unit: nn.Module, given: Any) -> Any:
        """The inputs of a module, with those that hold the batch cut to the first, which is the present step's."""
        seam = self._known[unit]
        assert seam.dims is not None
        leaves, form = pytree.tree_flatten(given)
        for number, (dim, shape) in enumerate(zip(seam.dims, seam.shapes, strict=True)):
            if dim is not None and shape is not None:
                leaves[number] = leaves[number].narrow(dim, 0, shape[dim])
        return pytree.tree_unflatten(leaves, form)

    def joined(self, unit: nn.Module, parts: list[list[Any]]) -> Any:
        """What a module gives for several steps, of the leaves that it gives for each."""
        seam = self._known[unit]
        columns = zip(*parts, strict=True)
        leaves = [torch.cat(own, seam.leaving) if isinstance(own[0], Tensor) else own[0] for own in columns]
        return pytree.tree_unflatten(leaves, seam.gave[1])

    def unread(self, unit: nn.Module, count: int) -> Any:
        """What stands for the outputs of `count` steps of a module that nobody reads."""
        return self.joined(unit, [pytree.tree_leaves(unread(self._known[unit].gave))] * count)


def _shapes(given: Any) -> list[torch.Size | None]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(given)]


def _clear(leaf: Any) -> bool:
    """Whether a batch could not be hidden in an input."""
    return isinstance(leaf, Tensor) or is_plain(leaf)


def _enlarged(one: torch.Size, many: torch.Size, count: int) -> list[int]:
    """The dimensions in which alone a shape is `count` times another."""
    if len(one) != len(many):
        return []
    different = [dim for dim, (a, b) in enumerate(zip(one, many, strict=True)) if a != b]
    return different if all(many[dim] == count * one[dim] for dim in different) else []
