"""Ring Attention with Blockwise Transformers for Near-Infinite Context. https://arxiv.org/abs/2310.01889."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdiff.parallel.exchange import Exchange
from fastdiff.parallel.halves import ByTurns
from fastdiff.parallel.heads import in_teams
from fastdiff.parallel.partial import attend_part, masked, merge
from fastdiff.parallel.split import Split
from fastdiff.parallel.travel import passed_on


def along(
    split: Split, exchange: Exchange, ranks: Sequence[int], counts: Sequence[int],
    query: Tensor, key: Tensor, value: Tensor, text: int, scale: float | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """The text's keys and values, which all ranks have, are seen once: with a rank's own."""
    place, size = ranks.index(split.bus.topology.rank), len(ranks)
    both, width = torch.cat([key, value], -1), key.shape[-1]
    count = both.shape[-2] - text
    blocks = passed_on(split, exchange, both[..., :count, :], ranks, counts)
    next(blocks)  # our own, which leaves now
    found = attend_part(query, key, value, masked(mask, counts, place, text), scale)
    for distance, block in enumerate(blocks, 1):
        seen = masked(mask, counts, (place - distance) % size)
        found = merge(found, attend_part(query, block[..., :width], block[..., width:], seen, scale))
    return found.out.to(query.dtype)


class Ring(ByTurns):
    """Keys and values travel round a ring of ranks, and a block is computed while the next is on its way. Exact.

    Sends what `patch` sends, but waits only for what takes longer than its attention, holds two blocks instead of all,
    and works with any number of heads. With `ulysses` = u, teams of u ranks share the heads out and the ring goes
    round the teams (USP, https://arxiv.org/abs/2405.07719): for more ranks than heads, and fewer bytes.

    Formula: o_r = merge over s of attention(q_r, k_(r-s), v_(r-s)), s = 0 .. p - 1; parts are merged by the logarithms
    of their sums, see `fastdiff.parallel.partial`.
    """

    method: Literal["ring"] = "ring"
    ulysses: int = Field(1, ge=1, description="ranks in a team that shares the heads out (exact, transformers)")

    attend: ClassVar[Any] = staticmethod(in_teams(along))

    def sharing(self, ranks: int) -> int:
        return self.ulysses
