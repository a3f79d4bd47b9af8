"""Eight-bit weights and activations (Q-Diffusion, https://arxiv.org/abs/2302.04304; ViDiT-Q,
https://arxiv.org/abs/2406.02540).

The input's range is static for each bucket of timesteps where `ranges` names a calibration: a diffusion model's
activations change with the noise level. Without one it is dynamic.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fastdiff.quant.base import QuantMethod
from fastdiff.quant.recipe import Activations


class W8A8(QuantMethod):
    """8-bit weights and inputs, multiplied as integers: a quarter of float32's memory, and the fast one on a CPU.

    Formula: y = a s sum (u - z) q + bias, with weights w = s q as in `w8a16` and inputs x = a (u - z), u in 0 .. 255,
    a = (high - low) / 255 and z = round(-low / a) of the timestep bucket's range, or of the input's own.
    """

    method: Literal["w8a8"] = "w8a8"

    format: ClassVar[str] = "int8"
    activations: ClassVar[Activations] = "int8"
