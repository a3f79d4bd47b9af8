"""What guidance makes of the denoiser's outputs, told by what the solver is given: errors count as they do after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.affine import wide

Mark = tuple[int, int]  # number of a run, index of a step


class Guidance:
    """By step, the factors with which the outputs of its calls make what the solver is given."""

    def __init__(self) -> None:
        self.shares: dict[Mark, tuple[int, int, list[float]]] = {}  # rows, channels and factors

    def solved(self, mark: Mark, outputs: Sequence[Tensor], given: Any) -> None:
        """What the solver is given at a step, and what its calls gave."""
        if not isinstance(given, Tensor) or given.ndim < 2:
            return
        count, channels = len(given), given.shape[1]
        parts = [part[:, :channels] for own in outputs for part in own.split(count)]
        if (factors := fitted(parts, given.detach())) is not None:
            self.shares[mark] = count, channels, factors

    def pairs(
        self, when: Sequence[Mark], outputs: Sequence[Tensor], truth: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the solver would be given now, and what it was given, step by step; single calls where that is unknown
        or not all of them are here."""
        for mark in dict.fromkeys(when):
            own = [k for k, other in enumerate(when) if other == mark]
            count, channels, factors = self.shares.get(mark, (0, 0, []))
            split = [[p for k in own for p in of[k].split(count or len(of[k]))] for of in (outputs, truth)]
            if len(factors) == len(split[0]):
                split = [[blended([p[:, :channels] for p in parts], factors)] for parts in split]
            yield from zip(*split, strict=True)


def fitted(parts: Sequence[Tensor], given: Tensor) -> list[float] | None:
    """Least-squares factors with which the parts make what is given, e_u + s (e_c - e_u) say; None if they do not."""
    if any(part.shape != given.shape for part in parts):
        return None
    columns = torch.stack([wide(part).flatten() for part in (*parts, given)])
    dots = (columns @ columns.mT).cpu()
    factors = torch.linalg.lstsq(dots[:-1, :-1], dots[:-1, -1:]).solution.flatten()
    left = 1 - float(factors @ dots[:-1, -1] / dots[-1, -1])  # of its square
    return factors.tolist() if left < 0.1 else None


def blended(parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    return torch.stack([factor * wide(part) for part, factor in zip(parts, factors, strict=True)]).sum(0)
