"""Attention of blocks of queries to some of the blocks of keys, exact for these: what is left out has no weight.

`kept` is a table (batch, heads, blocks of queries, blocks of keys), true where a block is computed; batch and heads may
be 1. Blocks count from the first token; the last one may be shorter. No row of it may be empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_GATHERED = 1 << 17  # numbers of keys that are copied side by side at once: half a MiB of float32, which caches hold


def attend(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, block: int, scale: float | None = None) -> Tensor:
    """Compiled flex attention on CUDA, elsewhere the gathering reference."""
    if query.is_cuda:
        return _compiled()(query, key, value, block_mask=flex_mask(kept, block, query.shape[-2]), scale=scale)
    return attend_blocks(query, key, value, kept, block, scale)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, block: int, scale: float | None = None
) -> Tensor:
    """query, key, value: (batch, heads, tokens, channels), the same number of tokens and heads. Returns what dense
    attention gives with -inf added wherever `kept` is false.

    Rows of blocks that read the same number of keys are computed together: their keys are gathered and nothing else is
    multiplied, so that the work is the kept share of the dense one.
    """
    tokens, count = query.shape[-2], kept.shape[-1]
    padding = -tokens % block
    kept = kept.expand(*query.shape[:2], -1, -1).flatten(0, 2)  # a row for each block of queries of each head
    queries, keys, values = (
        F.pad(x, (0, 0, 0, padding)).unflatten(-2, (-1, block)).flatten(0, 2) for x in (query, key, value)
    )
    first = torch.arange(len(kept), device=query.device) // count * count  # of the row's head among all blocks of keys
    out = queries.new_empty(*queries.shape[:2], value.shape[-1])
    kinds = kept.sum(-1) * 2 + kept[:, -1]  # the last block is shorter: rows that read it stand apart
    for kind in kinds.unique().tolist():
        number, short = kind // 2, padding if kind % 2 else 0
        most = max(1, _GATHERED // (number * block * query.shape[-1]))
        for rows in (kinds == kind).nonzero()[:, 0].split(most):
            columns = first[rows].repeat_interleave(number) + kept[rows].nonzero()[:, 1]
            key, value = (
                x.index_select(0, columns).view(len(rows), 1, number * block, -1)[:, :, : number * block - short]
                for x in (keys, values)
            )
            out[rows] = F.scaled_dot_product_attention(queries[rows][:, None], key, value, scale=scale)[:, 0]
    return out.view(*query.shape[:2], -1, out.shape[-1])[..., :tokens, :]


def flex_mask(kept: Tensor, block: int, tokens: int) -> BlockMask:
    """The table as flex attention reads it: every kept block is a full one, and nothing in it is masked."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Of a pair of tokens; only uncompiled flex attention asks."""
        one = (batch * (kept.shape[0] > 1), head * (kept.shape[1] > 1))
        return kept[(*one, query // block, key // block)]

    counts = kept.sum(-1, dtype=torch.int32)
    columns = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(counts)
    partly = columns.clone()  # one tensor under two names does not compile
    return BlockMask.from_kv_blocks(none, partly, counts, columns, block, seen, (tokens, tokens))


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
