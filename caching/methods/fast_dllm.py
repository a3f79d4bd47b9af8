"""Fast-dLLM: KV Cache and Parallel Decoding for Diffusion LLMs. Paper: https://arxiv.org/abs/2505.22618 (2025).

The prefix cache only: `LLaDA2Pipeline` commits confident tokens in parallel by itself.
"""

from __future__ import annotations

import inspect
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Forward
from fastdiff.caching.prefix import PrefixCache
from fastdiff.caching.protocols import Live
from fastdiff.caching.region import Region
from fastdiff.errors import UnsupportedModel

NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")


class FastDLLM(CacheMethod):
    """Keep the keys and values of a text's finished blocks; a step computes only the block that is being written.

    Formula: attention(q, [K_done; k], [V_done; v]): queries, keys and values of the open block only, after the kept
    ones of the finished blocks.
    """

    method: Literal["fast_dllm"] = "fast_dllm"
    verify: bool = Field(True, description="compare with the full forward where the first blocks end")

    language: ClassVar[bool] = True

    @model_validator(mode="after")
    def _no_idle_settings(self) -> FastDLLM:
        idle = [n for n, f in CacheMethod.model_fields.items() if n != "method" and getattr(self, n) != f.default]
        if idle:
            raise ValueError(f"fast_dllm predicts nothing and has no use for {', '.join(idle)}")
        return self

    def regions(self, anatomy: Anatomy) -> list[Region]:
        """None: a cached step still calls the model, on fewer tokens."""
        takes = inspect.signature(anatomy.denoiser.forward).parameters
        missing = [name for name in NEEDED if name not in takes]
        if missing:
            raise UnsupportedModel(
                f"fast_dllm needs a model that keeps keys and values, but {type(anatomy.denoiser).__name__}.forward "
                f"does not take {', '.join(missing)}"
            )
        return []

    def around(self, forward: Forward, session: Live) -> Forward:
        return PrefixCache(forward, session, self.verify).forward
