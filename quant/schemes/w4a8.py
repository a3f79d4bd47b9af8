"""Four-bit weights, eight-bit activations: dual-grained quantization (https://arxiv.org/abs/2310.04836).

A weight is a 4-bit number times a small integer of its group, an 8-bit integer in all, so that 8-bit kernels run it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fastdiff.quant.base import QuantMethod
from fastdiff.quant.recipe import Activations


class W4A8(QuantMethod):
    """4-bit weights in the file, 8 bits in memory where an 8-bit kernel runs it, with that kernel's speed.

    Formula: w = s c (q - z) with q in 0 .. 15, step c and zero z of 4 bits for each group, s for each output, so that
    c (q - z) is an 8-bit integer; inputs as in `w8a8`.
    """

    method: Literal["w4a8"] = "w4a8"

    format: ClassVar[str] = "dual4"
    activations: ClassVar[Activations] = "int8"
