"""Eight-bit floats, E4M3, with a scale for each row of both factors (FP8 formats, https://arxiv.org/abs/2209.05433)."""

from __future__ import annotations

from typing import ClassVar, Literal

from fastdiff.quant.base import QuantMethod
from fastdiff.quant.recipe import Activations


class FP8(QuantMethod):
    """8-bit floats, for GPUs of compute capability 8.9 and up; elsewhere the same numbers, from slow reference code.

    Formula: y = a s sum E4M3(x / a) E4M3(w / s), with a = max |x| / 448 of a row, s = max |w| / 448 of an output.
    """

    method: Literal["fp8"] = "fp8"

    format: ClassVar[str] = "float8"
    activations: ClassVar[Activations] = "fp8"
