"""dKV-Cache: The Cache for Diffusion Language Models. Paper: https://arxiv.org/abs/2505.15781 (2025).

Its variant Decode, in the open block of a pipeline that writes block after block.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.caching.base import Forward
from fastdiff.caching.delayed import DelayedCache
from fastdiff.caching.protocols import Live
from fastdiff.caching.written import TextMethod


class DKVCache(TextMethod):
    """Keep the keys and values of a text's tokens from one step after they were decoded; compute the others.

    Approximate: tokens that are kept no longer see what is decoded beside them. With editing, which needs fresh logits
    of all tokens, everything is computed.

    Formula: attention(q, [K_kept; k], [V_kept; v]), queries, keys and values of the positions that were open at the
    step before; at each interval-th step, and at the first of a block, of all positions. interval = 1 is exact.
    """

    method: Literal["dkv_cache"] = "dkv_cache"
    interval: int = Field(4, ge=1, description="steps from one full forward to the next; 1 computes everything")

    def around(self, forward: Forward, session: Live) -> Forward:
        return DelayedCache(forward, session, self.interval).forward
