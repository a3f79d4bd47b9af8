"""How far two results may be apart on any machine: the unit is what the machine, or quantization, does by itself.

Bits are compared where they are promised: the same sizes in one process, or the same file read twice. A batch of
another size, a product of another shape or weights at another alignment are summed in another order, and by how much
that changes a result is the processor's affair: plain diffusers, doing the same, tells.
"""

from __future__ import annotations

from torch import Tensor

FLOOR = 1e-5  # of the largest value; float32 keeps 6e-8, and a tiny denoiser adds up some hundred roundings
MARGIN = 20.0  # how much more a method may enlarge a rounding than the plain run: its predictions add up values


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value of `other`."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def rounding(one: Tensor, other: Tensor) -> float:
    """What two results may be apart of which `one` and `other` are the controls, made by plain diffusers."""
    return max(MARGIN * apart(one, other), FLOOR)
