"""Weights of one solver step by least squares, from sums of products alone: no picture has to be kept.

The objective is the mean of log |error|^2 over pictures, that is their mean PSNR, by reweighting each picture with
1 / |error|^2: one that the solver has lost to another mode does not spoil the step for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 8  # of reweighting; it settles in four or five
_FLOOR = 0.1  # of the median error, below which a picture counts for no more


@dataclass
class Products:
    """Of S pictures and K things that a step may be made of: `gram` (S, K, K), `cross` (S, K) with what is to be
    made, and its own square `rest` (S,); all divided by the number of values of a picture, float64."""

    gram: Tensor
    cross: Tensor
    rest: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor], wanted: Tensor) -> Products:
        """parts, wanted: (B, ...), one entry a picture."""
        rows = torch.stack([part.flatten(1).double() for part in parts], 1)
        goal, size = wanted.flatten(1).double(), wanted[0].numel()
        cross = torch.einsum("skn,sn->sk", rows, goal)
        return cls(rows @ rows.transpose(1, 2) / size, cross / size, goal.square().sum(1) / size)

    @classmethod
    def cat(cls, several: Sequence[Products]) -> Products:
        return cls(*(torch.cat([getattr(one, name) for one in several]) for name in ("gram", "cross", "rest")))

    def at(self, pictures: Tensor) -> Products:
        return Products(self.gram[pictures], self.cross[pictures], self.rest[pictures])

    def error(self, weights: Tensor) -> Tensor:
        """Mean square error of each picture, (S,)."""
        made = torch.einsum("skl,k,l->s", self.gram, weights, weights)
        return (made - 2 * self.cross @ weights + self.rest).clamp_min(0)


def solve(products: Products, prior: Tensor, ridge: float) -> Tensor:
    """The K weights of least mean log error; `ridge`, as a share of the mean square of the parts, pulls to `prior`."""
    weights = prior
    for _ in range(_ROUNDS):
        error = products.error(weights)
        trust = 1 / (error + _FLOOR**2 * error.median() + 1e-30)
        trust = trust / trust.sum()
        gram = torch.einsum("s,skl->kl", trust, products.gram)
        pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram + pull, trust @ products.cross + pull @ prior)
    return weights


def fitted(fit: Products, held: Products, prior: Tensor, ridges: Sequence[float]) -> Tensor:
    """The weights that held-out pictures like best among fits with several ridges and the prior itself."""
    found = [prior, *(solve(fit, prior, ridge) for ridge in ridges)]
    return min(found, key=lambda weights: float(held.error(weights).clamp_min(1e-30).log().mean()))
