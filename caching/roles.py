"""Which of two outputs is the conditional one: read off what the solver is given, e = e_u + s (e_c - e_u), s > 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.affine import wide


def conditional(first: Tensor, second: Tensor, solved: Tensor) -> int | None:
    """0 or 1; None where what the solver is given is no guidance of these two. One wait for the device.

    Least squares e = a first + b second, whose shares of a + b are s and 1 - s whatever the sign and the scale of e
    (Lumina turns the sign, rescaled guidance the scale). A denoiser may give more channels than it is asked for.
    """
    if first.ndim != solved.ndim or first.shape[:1] != solved.shape[:1] or first.shape[2:] != solved.shape[2:]:
        return None
    a, b, e = (wide(x.detach()[:, : solved.shape[1]]).flatten() for x in (first, second, solved))
    if a.shape != e.shape:
        return None
    dots = torch.stack([a @ a, a @ b, b @ b, a @ e, b @ e, e @ e]).tolist()
    aa, ab, bb, ae, be, ee = dots
    det = aa * bb - ab * ab
    if not det > 1e-9 * aa * bb:  # two alike, or no numbers
        return None
    x, y = (ae * bb - be * ab) / det, (be * aa - ae * ab) / det
    left = ee - x * ae - y * be
    if not left <= 0.1 * ee or x + y == 0:
        return None
    shares = x / (x + y), y / (x + y)
    return shares.index(max(shares)) if min(shares) < -1e-6 else None
