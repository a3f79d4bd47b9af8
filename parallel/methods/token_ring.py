"""TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication.
https://arxiv.org/abs/2412.20501."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdiff.parallel.exchange import Exchange
from fastdiff.parallel.halves import ByTurns
from fastdiff.parallel.heads import in_teams
from fastdiff.parallel.partial import Part, attend_part, masked, merge
from fastdiff.parallel.split import Split
from fastdiff.parallel.travel import Parcels


def along(
    split: Split, exchange: Exchange, ranks: Sequence[int], counts: Sequence[int],
    query: Tensor, key: Tensor, value: Tensor, text: int, scale: float | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """While the first guests come, a rank computes half of what its own queries find here; while its last results
    leave, the other half. The text's queries are on all ranks: what they find here is told to all."""
    place, size = ranks.index(split.bus.topology.rank), len(ranks)
    own, seen = counts[place], masked(mask, counts, place, text)
    half, (q, words) = own // 2, query.split([own, text], -2)

    def attend(queries: Tensor, begin: int, end: int | None) -> Part:
        keys = slice(begin, end)
        part = None if seen is None else seen[..., keys]
        return attend_part(queries, key[..., keys, :], value[..., keys, :], part, scale)

    tour, said = _Tour(split, exchange, ranks, counts, q), Parcels(split.bus, exchange)
    tour.leave(1, q, None)
    spoken = _say(said, ranks, split.bus.topology.rank, attend(words, 0, own), query) if text else []
    found = attend(q, 0, half)
    guest, _ = tour.arrive()
    result: Part | None = None
    for turn in range(2, size + 1):
        tour.leave(turn, guest, result)
        result = attend(guest, 0, own)
        guest, part = tour.arrive()
        found = found if part is None else merge(found, part)
    tour.leave(size + 1, guest, result)
    found = merge(found, attend(q, half, None))  # the text's, too
    _, part = tour.arrive()
    found = found if part is None else merge(found, part)
    if text:
        told = attend(words, own, None)
        for part in _heard(said, spoken):
            told = merge(told, part)
        found = Part(torch.cat([found.out, told.out], -2), found.lse)
    split.bus.drain()
    return found.out.to(query.dtype)


class _Tour:
    """One rank's part in the tour of all queries: a turn later each is at the next rank, and what it found at the last
    one is on its way home."""

    def __init__(
        self, split: Split, exchange: Exchange, ranks: Sequence[int], counts: Sequence[int], query: Tensor
    ) -> None:
        self.ranks, self.counts, self.query = ranks, counts, query
        self.place, self.parcels = ranks.index(split.bus.topology.rank), Parcels(split.bus, exchange)
        self._comes = self._returns = False

    def leave(self, turn: int, guest: Tensor, result: Part | None) -> None:
        ranks, place, size, shape = self.ranks, self.place, len(self.ranks), self.query.shape
        self._comes, self._returns = turn < size, result is not None
        if self._comes:
            count = self.counts[place - turn]
            self.parcels.send(ranks[(place + 1) % size], guest)
            self.parcels.expect("guest", ranks[place - 1], (*shape[:-2], count, shape[-1]), guest.dtype)
        if result is not None:
            self.parcels.send_part(ranks[place - turn + 2], result, guest.dtype)
            self.parcels.expect_part("result", ranks[(place + turn - 2) % size], shape, guest.dtype)
        self.parcels.leave()

    def arrive(self) -> tuple[Tensor, Part | None]:
        self.parcels.arrive()
        guest = self.parcels.take("guest") if self._comes else self.query
        return guest, self.parcels.take_part("result") if self._returns else None


def _say(
    parcels: Parcels, ranks: Sequence[int], own: int, part: Part, like: Tensor
) -> list[tuple[int, Part | None]]:  # fmt: skip
    """Tell all ranks what the text's queries found here; the list of who tells it, in order, ours among them."""
    dtype = like.dtype
    part = Part(part.out.to(dtype).to(part.lse.dtype), part.lse)  # as the others have it
    for peer in ranks:
        if peer != own:
            parcels.send_part(peer, part, dtype)
            parcels.expect_part(str(peer), peer, tuple(part.out.shape), dtype)
    parcels.leave()
    return [(peer, part if peer == own else None) for peer in ranks]


def _heard(parcels: Parcels, said: Sequence[tuple[int, Part | None]]) -> list[Part]:
    """In order of rank, so that the text is the same to the bit on all of them."""
    parcels.arrive()
    return [parcels.take_part(str(peer)) if part is None else part for peer, part in said]


class TokenRing(ByTurns):
    """Queries travel one way round a ring of ranks and what they found goes straight home the other way. Exact.

    Keys and values stay, so both directions of a link are used where `ring` uses one; what is sent is as much, and a
    float for each query and head. Unlike the authors' code it takes any lengths, sees the text of joint attention, and
    merges in float32. With `ulysses` = u, teams of u ranks share the heads out, as in `ring`.

    Formula: in turn s rank r computes attention(q_(r-s), k_r, v_r) and sends it, with the logarithm of its sum, to rank
    r - s, which merges what comes home: o_r = merge over s.
    """

    method: Literal["token_ring"] = "token_ring"
    ulysses: int = Field(1, ge=1, description="ranks in a team that shares the heads out (exact, transformers)")

    attend: ClassVar[Any] = staticmethod(in_teams(along))

    def sharing(self, ranks: int) -> int:
        return self.ulysses
