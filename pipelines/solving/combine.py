"""The sum that a fitted step is: what the scheduler's own step gives, and weights of the newest outputs and latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class At:
    """A solver step: the latents `x` that it was given, the model's output `f`, and `plain`, the latents that the
    scheduler itself would go on with; all (batch, ...)."""

    x: Tensor
    f: Tensor
    plain: Tensor


def counts(index: int, order: int) -> tuple[int, int]:
    """How many outputs and how many latents step `index` is made of: `order` outputs and one latent fewer, or as many
    as there are yet."""
    outputs = min(index + 1, order)
    return outputs, min(outputs, max(1, order - 1))


def parts(steps: Sequence[At], order: int) -> list[Tensor]:
    """What the newest step is made of, first of the outputs, then of the latents, the newest first."""
    outputs, latents = counts(len(steps) - 1, order)
    newest = [*reversed(steps)]
    return [at.f for at in newest[:outputs]] + [at.x for at in newest[:latents]]


def onward(steps: Sequence[At], weights: Sequence[float], order: int) -> Tensor:
    """The latents to go on with; without weights the scheduler's own, as they are."""
    plain = steps[-1].plain
    if not weights:
        return plain
    wide = torch.promote_types(plain.dtype, torch.float32)
    total = plain.to(wide)
    for weight, part in zip(weights, parts(steps, order), strict=True):
        total = total.add(part.to(wide), alpha=weight)
    return total.to(plain.dtype)
