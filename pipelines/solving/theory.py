"""What a second-order multistep solver does at a step, as weights of model outputs and latents.

DPM-Solver++(2M), https://arxiv.org/abs/2211.01095, eq. 9, with the exactly integrated line in place of the midpoint:
x' = (s'/s) x + a' (1 - e^-h) D, and D the data prediction carried on over the step, h = log(a'/s') - log(a/s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def flow_step(sigmas: Sequence[float], following: float) -> Tensor:
    """Weights, of the outputs and then of the latents, of a step from one or two flow-matching levels, the newest
    first, to `following`; of the first order where one of them is a pure state."""
    outputs, latents = torch.zeros(2, len(sigmas), dtype=torch.float64)
    for k, share in enumerate(_shares(sigmas, following)):
        outputs[k] = -share * sigmas[k]  # the data prediction is x - sigma f
        latents[k] = share
    latents[0] += following / sigmas[0]
    return torch.cat([outputs, latents])


def _shares(sigmas: Sequence[float], following: float) -> list[float]:
    """Weights of the newest data predictions."""
    whole = 1 - following - following / sigmas[0] * (1 - sigmas[0])  # what keeps a constant prediction exact
    if following <= 0 or len(sigmas) < 2 or sigmas[1] >= 1 or sigmas[0] >= 1:
        return [whole]
    at = [math.log((1 - s) / s) for s in (following, sigmas[0], sigmas[1])]
    h, before = at[0] - at[1], at[1] - at[2]
    slope = (1 - following) * (h - 1 + math.exp(-h)) / before
    return [whole + slope, -slope]
