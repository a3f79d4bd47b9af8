"""Eight-bit weights, float activations (the weight-only half of LLM.int8, https://arxiv.org/abs/2208.07339)."""

from __future__ import annotations

from typing import ClassVar, Literal

from fastdiff.quant.base import QuantMethod


class W8A16(QuantMethod):
    """8-bit weights: memory is saved at almost no error, and no time: a weight is made float at each call.

    Formula: w = s q with q = round(w / s) in -127 .. 127 and s = max |w| / 127 of an output's weights.
    """

    method: Literal["w8a16"] = "w8a16"

    format: ClassVar[str] = "int8"
