"""Who gets how much: of the work, in even shares or in such as suit how fast each rank is, and of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from fastdiff.errors import BadConfig
from fastdiff.method import Method

_SIZE, _TIMES = 256, 8  # of the matrix products that a first guess of a rank's speed is made of


class Shared(Method):
    """Settings that all parallel methods have of it."""

    shard: Literal["blocks"] | None = Field(
        None, description="blocks: each rank keeps its share of every block's weights, gathered before it runs (exact)"
    )
    shares: Literal["measured"] | tuple[float, ...] | None = Field(
        None, description="speed of each patch rank, or measured: rows, tokens and heads in proportion to it (exact)"
    )

    @model_validator(mode="after")
    def _can_be_shared(self) -> Shared:
        told: Any = self
        if self.shard and (told.on_peer_loss == "local" or told.own_axis == "step" or told.step > 1):
            asks = "on_peer_loss = raise and step = 1, and is not for parastep"
            raise BadConfig(f"parallel.shard = {self.shard}, for which all ranks are at a block together, needs {asks}")
        if isinstance(self.shares, tuple) and not all(speed > 0 for speed in self.shares):
            raise BadConfig(f"parallel.shares = {list(self.shares)}: a speed is above 0; leave out the device instead")
        return self


class Speeds:
    """How fast the patch ranks are, in any unit; nothing where shares are even. Changes between runs only."""

    def __init__(self, values: Sequence[float] = (), measured: bool = False) -> None:
        self.values, self.measured, self.used = list(values), measured, list[int]()

    def cut(self, total: int, parts: int) -> list[tuple[int, int]]:
        """Begin and end of the ranks' parts of a range of rows."""
        found = shares(total, parts, self.values)
        self.used = [end - begin for begin, end in found]
        return found

    def among(self, places: Sequence[int]) -> list[float]:
        """Of some of the ranks, by their places."""
        return [self.values[place] for place in places] if self.values else []

    def learn(self, reports: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> None:
        """After a run: what each rank had to do over how long it took without waiting."""
        took = [sum(reports[rank]["step_seconds"]) - reports[rank]["waited_seconds"] for rank in ranks]
        if self.measured and len(self.used) == len(took) and min(took) > 0:
            self.values = [count / seconds for count, seconds in zip(self.used, took, strict=True)]


def speeds(
    asked: Literal["measured"] | tuple[float, ...] | None, ranks: Sequence[int], device: torch.device,
    tell: Callable[[Any], list[Any]],
) -> Speeds:  # fmt: skip
    """What the ranks begin with: what is given, or how fast each multiplies matrices, until a run says more.

    Raises BadConfig.
    """
    if asked == "measured" and len(ranks) > 1:
        told = tell(_products(device))
        return Speeds([told[rank] for rank in ranks], measured=True)
    if isinstance(asked, tuple) and len(asked) != len(ranks):
        raise BadConfig(f"parallel.shares names {len(asked)} speeds, and there are {len(ranks)} patch ranks")
    return Speeds(asked if isinstance(asked, tuple) else ())


def _products(device: torch.device) -> float:
    """Matrix products a second; the best of some rounds, since what else the machine does only takes time."""
    matrix = torch.ones(_SIZE, _SIZE, device=device)
    best = 0.0
    for _ in range(_TIMES):
        began = time.perf_counter()
        for _ in range(_TIMES):
            matrix = (matrix @ matrix).clamp(0, 1)
        matrix.sum().item()  # all of it is done
        best = max(best, _TIMES / (time.perf_counter() - began))
    return best


def shares(total: int, parts: int, speeds: Sequence[float] = ()) -> list[tuple[int, int]]:
    """Begin and end of each part of a range: in proportion to the speeds, else even, the longer ones first.

    With `speeds` each part is at least 1, and of what rounding leaves each goes to whom it slows down least: a step
    takes as long as the largest part / speed (STADI, https://arxiv.org/abs/2509.04719, without its skipped steps).
    """
    if speeds and total >= parts:
        counts = [1] * parts
        for _ in range(total - parts):
            counts[min(range(parts), key=lambda k: ((counts[k] + 1) / speeds[k], k))] += 1
    else:
        base, extra = divmod(total, parts)
        counts = [base + (k < extra) for k in range(parts)]
    ends = [sum(counts[: k + 1]) for k in range(parts)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
