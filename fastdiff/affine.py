"""A scale and a shift for each channel of a feature: fitting them, and keeping them in a plan's JSON."""

from __future__ import annotations

import base64
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from .method import Settings


def _numbers(text: str) -> str:
    decoded(text)
    return text


Numbers = Annotated[str, AfterValidator(_numbers)]  # float32 in base64, so that a plan is one JSON file


class Affine(Settings):
    """y = scale * x + shift."""

    scale: Numbers = Field(max_length=1_000_000)
    shift: Numbers = Field(max_length=1_000_000)

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor) -> Affine:
        return cls(scale=encoded(scale), shift=encoded(shift))

    def tensors(self) -> tuple[Tensor, Tensor]:
        return decoded(self.scale), decoded(self.shift)


class AffineFit:
    """Least squares y = a x + b for each channel, from running sums; a is pulled towards 1 by `ridge`.

    axis: the dimension of channels; None goes by the number of dimensions.
    """

    def __init__(self, ridge: float, axis: int | None = None) -> None:
        self.ridge, self.axis = ridge, axis
        self.count = 0
        self.sums: Tensor | None = None  # x, y, xx, xy by channel

    def add(self, x: Tensor, y: Tensor) -> None:
        rows, wanted = channel_rows(x, self.axis), channel_rows(y, self.axis)
        sums = torch.stack([rows.sum(0), wanted.sum(0), (rows * rows).sum(0), (rows * wanted).sum(0)])
        self.count += len(rows)
        self.sums = sums if self.sums is None else self.sums + sums

    def solve(self) -> tuple[Tensor, Tensor]:
        """Scale and shift by channel; a channel that never changes is only shifted."""
        assert self.sums is not None
        x, y, xx, xy = self.sums / self.count
        variance, covariance = (xx - x * x).clamp_min(0), xy - x * y
        pull = self.ridge * variance
        scale = torch.where(variance > 1e-12, (covariance + pull) / (variance + pull).clamp_min(1e-300), 1.0)
        return scale, y - scale * x


def corrected(value: Tensor, scale: Tensor, shift: Tensor, axis: int | None = None) -> Tensor:
    """scale * value + shift along the dimension of channels, `axis`.

    Where nobody knows that, `channel_axis` guesses it.
    """
    shape = [1] * value.ndim
    shape[channel_axis(value) if axis is None else axis] = -1
    scale, shift = (numbers.float().to(value.device).view(shape) for numbers in (scale, shift))
    return (value.float() * scale + shift).to(value.dtype)


def channel_rows(value: Tensor, axis: int | None = None) -> Tensor:
    """[n, channels] in float64; `axis` as of `corrected`."""
    moved = value.movedim(channel_axis(value) if axis is None else axis, -1)
    return wide(moved.reshape(-1, moved.shape[-1]))


def wide(numbers: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (MPS, some XPUs)."""
    return (numbers if numbers.device.type in ("cpu", "cuda", "meta") else numbers.cpu()).double()


def channel_axis(value: Tensor) -> int:
    """A guess: the second dimension of four or more, as of maps, and the last of fewer, as of tokens."""
    return 1 if value.ndim > 3 else -1


def encoded(numbers: Tensor) -> str:
    """Little-endian float32 in base64."""
    return base64.b64encode(numbers.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def decoded(text: str) -> Tensor:
    """The numbers, one row. Raises ValueError for what `encoded` did not make, and for numbers that are not finite."""
    try:
        found = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
    except ValueError:
        raise ValueError("a correction is not float32 numbers in base64") from None
    if not found.isfinite().all():
        raise ValueError("a correction holds a number that is not finite")
    return found
