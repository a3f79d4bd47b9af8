"""Accelerating Diffusion LLMs via Adaptive Parallel Decoding. Paper: https://arxiv.org/abs/2506.00413 (2025).

Where target and proposal part, the paper keeps the proposal's token if it is the first; here the target's is committed,
so that a ratio of 0 is the verifier itself. Its windows of cached positions are what `prefix` is in a pipeline that
writes block after block.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from torch import nn

from fastdiff.caching.another import AnotherModel
from fastdiff.caching.base import Forward
from fastdiff.caching.prefix import PrefixCache
from fastdiff.caching.protocols import Live
from fastdiff.caching.verifying import Verifying
from fastdiff.caching.written import TextMethod
from fastdiff.errors import BadConfig


class APD(TextMethod):
    """Write from left to right, as many tokens a step as a small causal model agrees with.

    It takes the place of the pipeline's threshold, needs editing off, and takes its noise from the call's generator.

    Formula: x_p = argmax(log D_p / T + g_p) is proposed at each open position p, y_p = argmax((r log D_p +
    (1 - r) log V_p(x_<p)) / T + g_p) is the target, of the same Gumbel noise g_p; committed are the y up to and with
    the first that is not x. ratio = 0 is a sample of the verifier V, ratio = 1 all of the diffusion model's proposals.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    method: Literal["apd"] = "apd"
    verifier: AnotherModel = Field(description="a causal language model: a module, or its directory")
    ratio: float = Field(0.7, ge=0, le=1, description="share of the diffusion model in the target")
    prefix: bool = Field(True, description="keep the keys and values of finished blocks, as fast_dllm does")
    verify: bool = Field(True, description="with prefix: compare with the full forward where the first blocks end")

    def around(self, forward: Forward, session: Live) -> Forward:
        if not isinstance(self.verifier, nn.Module):
            raise BadConfig(f"the verifier was not read from {self.verifier!r}")
        inner = PrefixCache(forward, session, self.verify).forward if self.prefix else forward
        return Verifying(inner, session, self.verifier, self.ratio).forward
