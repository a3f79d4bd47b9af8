"""Methods that wait in every step, where halves of a batch may take turns: one's exchange under the other's work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy
from fastdiff.batches import Batches
from fastdiff.errors import BadConfig

from .base import ParallelMethod
from .split import Forward, Split


class ByTurns(ParallelMethod):
    """Settings of methods that wait for this very step's values, of which none is old."""

    halves: bool = Field(
        False, description="halves of the batch take turns, one sends while the other computes (exact)"
    )

    @model_validator(mode="after")
    def _whole_blocks(self) -> ByTurns:
        if self.halves and self.shard:
            raise BadConfig(
                f"parallel.halves runs each block twice a step, and shard = {self.shard} would gather it twice; leave "
                "one of them out"
            )
        return self


def in_halves(split: Split, anatomy: Anatomy, forward: Forward) -> Forward:
    """A denoiser's forward whose batch is computed in two parts that take turns, where the method asks for that.

    Two calls of half the batch are the same as one, to rounding. Where a batch cannot be halved it is computed as it
    is, and the report says so. Raises BadConfig where layers are compiled: a graph has one call stack.
    """
    if not getattr(split.method, "halves", False):
        return forward
    if split.bus.opaque is not None:
        raise BadConfig("parallel.halves changes between two calls inside the layers, which no graph can; set it false")
    batches, turns = Batches(anatomy), split.bus.turns

    @wraps(forward)
    def halved(*args: Any, **kwargs: Any) -> Any:
        count, unknown = batches.size(args, kwargs), batches.unknown(args, kwargs)
        why = None
        if unknown is not None:
            why = f"not all inputs of this denoiser are known to have the batch first ({unknown})"
        elif count < 2:
            why = f"a batch of {count} has no two halves"
        if why is not None:
            split.note(f"{why}: parallel.halves changed nothing")
            return forward(*args, **kwargs)
        calls = (_part(batches, forward, args, kwargs, count, part) for part in (0, 1))
        one, other = (pytree.tree_flatten(output) for output in turns.run(*calls))
        pairs = zip(one[0], other[0], strict=True)
        both = [torch.cat(pair) if isinstance(pair[0], Tensor) else pair[0] for pair in pairs]
        return pytree.tree_unflatten(both, one[1])

    return halved


def _part(batches: Batches, forward: Forward, args: tuple, kwargs: dict, count: int, part: int) -> Callable[[], Any]:
    """The call of one part. What has several rows for each image (a UNet's frames) is cut between images."""

    def rows(x: Any) -> Any:
        middle = len(x) // count * ((count + 1) // 2)
        return x[middle:] if part else x[:middle]

    args, kwargs = batches.change(args, kwargs, rows)
    return partial(forward, *args, **kwargs)
