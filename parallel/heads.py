"""Tokens for heads: within a team of ranks, each computes attention of a share of the heads for the team's tokens.

Source: DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509; teams that pass on what they have: USP,
https://arxiv.org/abs/2405.07719.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UnsupportedModel

from .attention import Layout, is_attention
from .exchange import Exchange
from .shares import shares
from .split import Split

# of the team's picture tokens and then the text's, (batch, heads, tokens, channels), and how many the latter are
Inner = Callable[[Tensor, Tensor, Tensor, int], Tensor]
Along = Callable[..., Tensor]  # passes on along some ranks, which have so many tokens each


def by_heads(
    split: Split, layer: str, team: Sequence[int], counts: Sequence[int], own: slice,
    query: Tensor, key: Tensor, value: Tensor, inner: Inner, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Tokens for heads, attention, heads for tokens. `own` are the tokens of the picture; text is on all ranks.

    team: the ranks, in order; counts: the picture's tokens that each of them has. groups: into how many a rank's heads
    are dealt, at most; one travels while the one before it is computed (PipeDiT, https://arxiv.org/abs/2511.12056).
    """
    text = query.shape[-2] - (own.stop - own.start)
    if len(team) == 1:
        q, k, v = (_picture_first(x, own) for x in (query, key, value))
        return _placed(inner(q, k, v, text), own, text)
    if key.shape[1] != query.shape[1]:
        raise UnsupportedModel(
            f"{layer} has {query.shape[1]} heads of queries and {key.shape[1]} of keys, which cannot be shared out "
            "alike; take method = ring without ulysses"
        )
    place, batch, width = team.index(split.bus.topology.rank), query.shape[0], query.shape[-1]
    speeds = split.bus.speeds.among([split.ranks.index(rank) for rank in team])
    dealt = _groups(shares(query.shape[1], len(team), speeds), groups)
    packed, total = _picture_first(torch.stack([query, key, value]), own), sum(counts)
    mine = packed.shape[-2] - text

    def offer(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Callable[[], list[Tensor]]:
        return split.bus.offer("kv", layer, parts, team, shapes)

    coming, leaving = [], []
    for those in dealt:
        shapes = [(3, batch, _len(those[place]), count, width) for count in counts]
        coming.append(offer([packed[:, :, heads, :mine] for heads in those], shapes))
    for those, arrived in zip(dealt, coming, strict=True):
        words = packed[:, :, those[place], mine:]
        q, k, v = torch.cat([*arrived(), words], -2)
        out = inner(q, k, v, text)
        seen = [torch.cat([part, out[..., total:, :]], -2) for part in out[..., :total, :].split(list(counts), -2)]
        leaving.append(offer(seen, [(batch, _len(heads), counts[place] + text, width) for heads in those]))
    back = [arrived() for arrived in leaving]
    split.bus.drain()
    return _placed(torch.cat([part for rank in zip(*back, strict=True) for part in rank], 1), own, text)


def _groups(ranges: Sequence[tuple[int, int]], groups: int) -> list[list[slice]]:
    """Heads of each rank, in so many groups, or in one for each head where a rank has fewer."""
    groups = min(groups, *(end - begin for begin, end in ranges))
    parts = [shares(end - begin, groups) for begin, end in ranges]
    return [
        [slice(begin + part[k][0], begin + part[k][1]) for (begin, _), part in zip(ranges, parts, strict=True)]
        for k in range(groups)
    ]


def _len(heads: slice) -> int:
    return heads.stop - heads.start


def check_heads(blocks: Sequence[nn.Module], team: int, method: str) -> None:
    """Raises UnsupportedModel where a layer has too few heads for the ranks of a team."""
    for module in (m for block in blocks for m in block.modules() if is_attention(m)):
        heads = getattr(module, "heads", 0)
        if 0 < heads < team:
            raise UnsupportedModel(
                f"{method} gives each rank a share of the heads: {heads} heads cannot be shared by {team} ranks; take "
                f"method = ring with ulysses = {heads} or less"
            )


def in_teams(along: Along) -> Callable[..., Tensor]:
    """Attention on a mesh of two axes: ranks next to each other are a team that shares the heads out, and those that
    have the same heads pass on what they have."""

    def attend(
        split: Split, exchange: Exchange, layout: Layout, own: slice,
        query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        if options.get("is_causal"):
            raise UnsupportedModel(f"{exchange.layer} looks back only, which {split.method.method} cannot split")
        size, place, ranks = split.method.sharing(len(split.ranks)), split.place, split.ranks
        counts, first = layout.counts(own.stop - own.start), place - place % size
        together = [sum(counts[k : k + size]) for k in range(0, len(counts), size)]

        def inner(q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
            how = options.get("scale"), options.get("attn_mask")
            return along(split, exchange, ranks[place % size :: size], together, q, k, v, text, *how)

        team = slice(first, first + size)
        return by_heads(split, exchange.layer, ranks[team], counts[team], own, query, key, value, inner)

    return attend


def _picture_first(x: Tensor, own: slice) -> Tensor:
    if own.start == 0:  # as it is
        return x
    return torch.cat([x[..., own, :], x[..., : own.start, :], x[..., own.stop :, :]], -2)


def _placed(x: Tensor, own: slice, text: int) -> Tensor:
    """The picture's tokens back where they were among the text's."""
    if own.start == 0:
        return x
    count = x.shape[-2] - text
    before, after = x[..., count : count + own.start, :], x[..., count + own.start :, :]
    return torch.cat([before, x[..., :count, :], after], -2)
