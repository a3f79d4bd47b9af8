"""Fast-dLLM: KV Cache and Parallel Decoding for Diffusion LLMs. Paper: https://arxiv.org/abs/2505.22618 (2025).

The prefix cache only: `LLaDA2Pipeline` commits confident tokens in parallel by itself.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.caching.base import Forward
from fastdiff.caching.prefix import PrefixCache
from fastdiff.caching.protocols import Live
from fastdiff.caching.written import TextMethod


class FastDLLM(TextMethod):
    """Keep the keys and values of a text's finished blocks; a step computes only the block that is being written.

    Formula: attention(q, [K_done; k], [V_done; v]): queries, keys and values of the open block only, after the kept
    ones of the finished blocks.
    """

    method: Literal["fast_dllm"] = "fast_dllm"
    verify: bool = Field(True, description="compare with the full forward where the first blocks end")

    def around(self, forward: Forward, session: Live) -> Forward:
        return PrefixCache(forward, session, self.verify).forward
