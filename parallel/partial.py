"""Attention to some of the keys, and the one way in which such parts become attention to all of them.

Source: Ring Attention, https://arxiv.org/abs/2310.01889; the merge is that of TokenRing, https://arxiv.org/abs/2412.20501.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_WIDEST = 256  # channels of a head that the fused kernels of GPUs take


class Part(NamedTuple):
    """What queries found among some keys. out: (batch, heads, queries, channels); lse: (batch, heads, queries), the
    natural logarithm of the sum of their exponentiated scores, -inf where there was no key to see."""

    out: Tensor
    lse: Tensor


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Part:
    """Attention of (batch, heads, tokens, channels) queries to keys that may be a part of all, or none.

    mask: true where a query sees a key, or numbers that are added to the scores; broadcast to (batch, heads, queries,
    keys). Both results are in float32, in float64 for such queries: parts are merged before they are rounded.
    """
    given = (query, key, value)
    if has_torch_function(given):  # whoever counts operations or virtual time sees this as it sees whole attention
        found = handle_torch_function(attend_part, given, *given, mask=mask, scale=scale)
        return Part(*found)
    wide = torch.promote_types(query.dtype, torch.float32)
    if not query.shape[:-1].numel() or not key.shape[-2]:  # the kernel for CPUs ends the process at either
        out = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=wide)
        return Part(out, query.new_full(query.shape[:-1], -math.inf, dtype=wide))
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        mask = mask.expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])
    out, lse = _kernel(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)
    out, lse = out.to(wide), lse.to(wide)
    if mask is not None:  # of a query that sees nothing kernels say 0 and 0, which would weigh as much as a key
        blind = (mask == -math.inf).all(-1)
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -math.inf)
    return Part(out, lse)


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, fused where torch has a kernel that returns both."""
    aten = torch.ops.aten
    if query.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)
    fused = _fused(query.dtype, query.shape[-1], query.device) if query.is_cuda and mask is None else ""
    if fused == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)[:2]
    if fused == "efficient":
        found = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
        return found[0], found[1][..., : query.shape[-2]]  # padded to a multiple of 32
    scores = query @ key.transpose(-1, -2) * scale
    scores = (scores if mask is None else scores + mask).to(torch.promote_types(query.dtype, torch.float32))
    lse = scores.logsumexp(-1)
    seen = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    return seen @ value.to(seen.dtype), lse


def _fused(dtype: torch.dtype, channels: int, device: torch.device) -> str:
    """Which of CUDA's kernels takes such a head, if any: flash attention begins with Ampere, as bfloat16 does."""
    if channels % 8 or channels > _WIDEST:
        return ""
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    if ampere and dtype in (torch.float16, torch.bfloat16):
        return "flash"
    return "efficient" if dtype in (torch.float16, torch.float32) else ""


def masked(mask: Tensor | None, counts: Sequence[int], place: int, text: int = 0) -> Tensor | None:
    """Of a mask for the picture's keys, of ranks with so many of them, and then the text's: one rank's part."""
    if mask is None:
        return None
    parts = mask.split([*counts, mask.shape[-1] - sum(counts)], -1)
    return torch.cat([parts[place], parts[-1][..., :text]], -1)


def merge(one: Part, other: Part) -> Part:
    """What the same queries find among the keys of both parts; a part without keys changes nothing.

    Formula: o = o_a + w (o_b - o_a) with w = sigmoid(l_b - l_a); l = ln(exp l_a + exp l_b).
    """
    share = torch.sigmoid((other.lse - one.lse).nan_to_num())  # neither has a key: both outputs are 0
    return Part(torch.lerp(one.out, other.out, share[..., None]), torch.logaddexp(one.lse, other.lse))
