"""DeepSpeed Ulysses: System Optimizations for Extreme Long Sequence Transformers. https://arxiv.org/abs/2309.14509."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fastdiff.parallel.attention import Layout
from fastdiff.parallel.exchange import Exchange
from fastdiff.parallel.halves import ByTurns
from fastdiff.parallel.heads import by_heads
from fastdiff.parallel.split import Split


def attend(
    split: Split, exchange: Exchange, layout: Layout, own: slice,
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    def whole(q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    counts = layout.counts(own.stop - own.start)
    asked: Any = split.method
    return by_heads(split, exchange.layer, split.ranks, counts, own, query, key, value, whole, asked.groups)


class Ulysses(ByTurns):
    """Sequence parallelism of transformers: in attention each rank has all tokens and a share of the heads. Exact.

    Formula: of p ranks with H heads, rank r computes attention(q_h, k_h, v_h) over all tokens for its share of H / p
    of the heads h, those of the first ranks rounded up; one exchange before it turns tokens into heads, one after it
    turns them back.
    """

    method: Literal["ulysses"] = "ulysses"
    groups: int = Field(1, ge=1, description="groups of a rank's heads, one travels while another is computed (exact)")

    attend: ClassVar[Any] = staticmethod(attend)

    def sharing(self, ranks: int) -> int:
        return ranks
