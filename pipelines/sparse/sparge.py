"""SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference. https://arxiv.org/abs/2502.18137 (2025).

Its first stage, the choice of blocks; the second, which skips inside a kernel, needs one. Keeping the choice for some
steps is that of AdaSpa, https://arxiv.org/abs/2502.21079.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.attention import Attention


def sparge(query: Tensor, key: Tensor, picture: tuple[int, int], how: Attention, scale: float | None) -> Tensor:
    """Which blocks are kept, for each head of each picture: (batch, heads, blocks, blocks).

    query, key: (batch, heads, tokens, channels). From the means q_i, k_j of blocks, P = softmax(q_i k_j scale) over j;
    of each row the `keep` share of blocks with the largest P, or the fewest with a sum of `mass`. Blocks whose tokens
    are alike by less than `similarity` are computed with all others (their mean says little), as are those with text
    and those on the diagonal. keep = 1 and mass = 1 keep everything.
    """
    tokens, channels = query.shape[-2:]
    q, k = (_blocks(x, how.block) for x in (query, key))
    scale = channels**-0.5 if scale is None else scale
    shares = torch.softmax(_mean(q, tokens, how.block) @ _mean(k, tokens, how.block).mT * scale, -1)
    ranked = shares.argsort(dim=-1, descending=True, stable=True)
    if how.mass is None:
        most = math.ceil((0.25 if how.keep is None else how.keep) * shares.shape[-1])
        kept = torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, ranked[..., :most], True)
    else:
        ordered = shares.gather(-1, ranked)
        wanted = (ordered.cumsum(-1) - ordered < how.mass) | (how.mass == 1)
        kept = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    starts = torch.arange(0, tokens, how.block, device=query.device)
    text = (starts < picture[0]) | ((starts + how.block).clamp_max(tokens) > picture[1])
    kept = kept | text[:, None] | text[None] | torch.eye(len(starts), dtype=torch.bool, device=query.device)
    if how.similarity:
        kept = kept | _unlike(q, tokens, how)[..., None] | _unlike(k, tokens, how)[..., None, :]
    return kept


def _blocks(x: Tensor, block: int) -> Tensor:
    """(batch, heads, blocks, tokens of a block, channels) in float32 or wider, zeros after the last token."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.pad(wide, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def _mean(blocks: Tensor, tokens: int, block: int) -> Tensor:
    """The mean over each block's own tokens."""
    lengths = torch.full(blocks.shape[2:3], block, device=blocks.device)
    lengths[-1] -= -tokens % block
    return blocks.sum(-2) / lengths[:, None]


def _unlike(blocks: Tensor, tokens: int, how: Attention) -> Tensor:
    """Blocks whose mean cosine of all pairs, the squared length of the mean direction, is less than asked."""
    directions = F.normalize(blocks, dim=-1)
    return _mean(directions, tokens, how.block).square().sum(-1) < how.similarity
