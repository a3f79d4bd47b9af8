"""Layers that talk to other ranks, inside a graph of torch.compile: an operator that no graph looks into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fastdiff.patch import PatchSet

Talk = Callable[..., Tensor]  # (shape of what is returned, *tensors, **options)

_SCHEMA = (
    "(Tensor(a!) order, Tensor place, Tensor[] given, SymInt[] shape, *, Tensor? attn_mask=None, float dropout_p=0., "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor"
)


class Opaque:
    """One operator for all layers of a pipeline. Which layer it is says a tensor, so that blocks of a kind share their
    graph; each call writes to `order`, so that no compiler changes the order in which all ranks have to talk."""

    def __init__(self, patches: PatchSet) -> None:
        self._layers: list[Talk] = []
        self._order, known = torch.zeros(1), torch.ops.fastdiff_parallel
        name = next(name for name in map("talk_{}".format, count()) if not hasattr(known, name))
        library = Library("fastdiff_parallel", "FRAGMENT")
        patches.call(lambda: library.define(name + _SCHEMA), library._destroy)
        library.impl(name, self._talk, "CompositeExplicitAutograd")
        register_fake(
            f"fastdiff_parallel::{name}", lambda _, place, given, shape, **how: given[0].new_empty(shape), lib=library
        )
        self._operator: Any = getattr(known, name).default

    def hidden(self, layer: Talk) -> Talk:
        """The same layer, behind the operator where a graph is made."""
        place, order, operator = torch.tensor(len(self._layers)), self._order, self._operator
        self._layers.append(layer)

        def talk(shape: Sequence[int], *given: Tensor, **options: Any) -> Tensor:
            if torch.compiler.is_compiling():
                return operator(order, place, list(given), shape, **options)
            return layer(shape, *given, **options)

        return talk

    def _talk(self, _: Tensor, place: Tensor, given: list[Tensor], shape: Sequence[int], **options: Any) -> Tensor:
        return self._layers[int(place)](shape, *given, **options).contiguous()  # as the graph was told
