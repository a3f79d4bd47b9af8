"""DeepSpeed Ulysses: System Optimizations for Extreme Long Sequence Transformers. https://arxiv.org/abs/2309.14509."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.parallel.attention import Layout
from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.exchange import Exchange
from fastdiff.parallel.split import Split


def attend(
    split: Split, exchange: Exchange, layout: Layout, own: slice,
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Tokens for heads, attention, heads for tokens. `own` are the tokens of the picture; text is on all ranks."""
    ranks, layer = split.ranks, exchange.layer
    counts, batch, width = layout.counts(own.stop - own.start), query.shape[0], query.shape[-1]
    shares = [query.shape[1] // len(ranks)] * len(ranks)
    mine = slice(shares[0] * split.place, shares[0] * (split.place + 1))

    def deal(parts: Sequence[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return split.bus.deal("kv", layer, parts, "patch", shapes)

    packed = torch.stack([query, key, value])
    there = packed[..., own, :].split(shares, 2)
    picture = torch.cat(deal(there, [(3, batch, shares[0], count, width) for count in counts]), -2)
    text = torch.cat([packed[..., : own.start, :], packed[..., own.stop :, :]], -2)
    q, k, v = torch.cat([picture, text[:, :, mine]], -2)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    total = sum(counts)
    back = deal(out[..., :total, :].split(counts, -2), [(batch, n, counts[split.place], width) for n in shares])
    words = deal([out[..., total:, :]] * len(ranks), [(batch, n, text.shape[-2], width) for n in shares])
    image, told = torch.cat(back, 1), torch.cat(words, 1)
    return torch.cat([told[..., : own.start, :], image, told[..., own.start :, :]], -2)


class Ulysses(ParallelMethod):
    """Sequence parallelism of transformers: in attention each rank has all tokens and a share of the heads. Exact.

    Formula: of p ranks with H heads, rank r computes attention(q_h, k_h, v_h) over all tokens for h = r H / p to
    (r + 1) H / p - 1; one exchange before it turns tokens into heads, one after it turns them back.
    """

    method: Literal["ulysses"] = "ulysses"

    heads: ClassVar[bool] = True
    attend: ClassVar[Any] = staticmethod(attend)
