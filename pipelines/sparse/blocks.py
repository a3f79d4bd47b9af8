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

_GATHERED = 1 << 20  # numbers of keys that are copied side by side at once: 4 MiB of float32


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
    tokens = query.shape[-2]
    padding = -tokens % block
    kept = kept.expand(*query.shape[:2], *kept.shape[2:])
    blocks = [F.pad(x, (0, 0, 0, padding)).unflatten(-2, (-1, block)) for x in (query, key, value)]
    out = blocks[0].new_empty((*blocks[0].shape[:-1], value.shape[-1]))
    counts = kept.sum(-1) * 2 + kept[..., -1]  # the last block is shorter: rows that read it stand apart
    for count in counts.unique().tolist():
        number, short = count // 2, padding if count % 2 else 0
        rows = (counts == count).nonzero()
        most = max(1, _GATHERED // (number * block * query.shape[-1]))
        for part in rows.split(most):
            batch, head, row = part.unbind(1)
            columns = kept[batch, head, row].nonzero()[:, 1].view(-1, number)
            where = (batch[:, None], head[:, None], columns)
            keys, values = (x[where].flatten(1, 2)[:, : number * block - short] for x in blocks[1:])
            found = F.scaled_dot_product_attention(
                blocks[0][batch, head, row][:, None], keys[:, None], values[:, None], scale=scale
            )
            out[batch, head, row] = found[:, 0]
    return out.flatten(-3, -2)[..., :tokens, :]


def flex_mask(kept: Tensor, block: int, tokens: int) -> BlockMask:
    """The table as flex attention reads it: every kept block is a full one, and nothing in it is masked."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Of a pair of tokens; only uncompiled flex attention asks."""
        one = (batch * (kept.shape[0] > 1), head * (kept.shape[1] > 1))
        return kept[(*one, query // block, key // block)]

    counts = kept.sum(-1, dtype=torch.int32)
    columns = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(none, columns, counts, columns, block, seen, (tokens, tokens))


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
