"""A weight that is divided by what is learned for it before it is rounded (FlexRound, https://arxiv.org/abs/2306.00317)."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import FORMATS, Int4, Int8, Tensors
from .recipe import Recipe
from .rounding import best_scale, in_groups, to_integers


class Divided:
    """A weight [n, k] with learned logarithms: of its scales, of a divisor for each weight and for each row.

    It holds the integers and scales that were kept last: at first those of the clipping search.
    """

    def __init__(self, weight: Tensor, recipe: Recipe) -> None:
        """recipe: of the format int4 or int8."""
        form = FORMATS[recipe.format]
        assert isinstance(form, Int4 | Int8)
        self.weight, self._form = weight, form
        self._grouped, self._low, self._high, start = _start(weight, recipe)
        self._sign = torch.where(start < 0, -1.0, 1.0)
        self._scale = start.abs().log().clamp_min(-60).requires_grad_()
        self._divisor = torch.zeros_like(self._grouped, requires_grad=True)
        rows = (len(weight), *[1] * (self._grouped.ndim - 1))
        self._row = torch.zeros(rows, device=weight.device, requires_grad=True)
        self._best = to_integers(self._grouped, start, self._low, self._high), start
        self._at = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def parameters(self) -> list[Tensor]:
        return [self._scale, self._divisor, self._row]

    def rate(self, of_four_bits: float) -> float:
        """A level of 8 bits is a smaller step."""
        return of_four_bits * 7 / self._high

    def soft(self) -> Tensor:
        """Its values [n, k] now, for gradients: rounding passes them on as they are."""
        divided = self._grouped / (self._sign * (self._scale + self._divisor + self._row).exp())
        rounded = (divided + (divided.round() - divided).detach()).clamp(self._low, self._high)
        return self._plain(rounded * self._sign * self._scale.exp())

    @torch.no_grad()
    def now(self) -> Tensor:
        """Its values [n, k] as they would be stored now."""
        integers, scale = self._found()
        return self._plain(integers * scale)

    def kept(self) -> Tensor:
        """Its values [n, k] with what was kept."""
        return self._plain(self._best[0] * self._best[1])

    @torch.no_grad()
    def keep(self) -> None:
        self._best = self._found()
        self._at = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def back(self) -> None:
        """Go on from what was kept."""
        for parameter, before in zip(self.parameters, self._at, strict=True):
            parameter.copy_(before)

    def tensors(self) -> Tensors:
        """What was kept, as it is stored."""
        return self._form.store(*self._best)

    def _found(self) -> tuple[Tensor, Tensor]:
        scale = self._sign * (self._scale.exp().half().float() if isinstance(self._form, Int4) else self._scale.exp())
        integers = to_integers(self._grouped, scale * (self._divisor + self._row).exp(), self._low, self._high)
        return integers, scale

    def _plain(self, values: Tensor) -> Tensor:
        return values.flatten(1)[:, : self.weight.shape[1]]


def _start(weight: Tensor, recipe: Recipe) -> tuple[Tensor, int, int, Tensor]:
    """The weight in the format's groups, its levels, and the scales of the clipping search."""
    if recipe.format == "int8":
        scale = best_scale(weight, weight.abs().amax(-1, keepdim=True) / 127, -127, 127, "mse")
        return weight, -127, 127, scale.clamp_min(1e-12)
    grouped = in_groups(weight, recipe.group)
    top = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = best_scale(grouped, -top / 8, -8, 7, "mse").half().float()
    return grouped, -8, 7, torch.where(scale == 0, torch.full_like(scale, 2**-14), scale)
