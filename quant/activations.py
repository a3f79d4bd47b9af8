"""Activations as 8-bit levels: value = (level - zero) * scale, of rows [n, channels].

Ranges are static, one for each bucket of timesteps, so that no pass over the tensor is needed and all ranks of a patch
split agree; or dynamic: symmetric for each token of a linear layer, as in ViDiT-Q (https://arxiv.org/abs/2406.02540),
one asymmetric range for each picture that a convolution is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Range = tuple[float | Tensor, int | Tensor]  # scale and zero
_CHUNK = 1 << 17  # elements that stay in a core's cache from one pass to the next


@dataclass(frozen=True)
class Levels:
    """Quantized rows [n, channels], uint8 or, where all are 128 lower, int8; `scale` is a number, or [n, 1] with a
    scale for each row.

    Numbers that were found on a device, or are looked up in a graph, are tensors without dimensions.
    """

    q: Tensor
    scale: float | Tensor
    zero: int | Tensor

    @property
    def by_row(self) -> Tensor | None:
        """The scale, where each row has its own."""
        return self.scale if isinstance(self.scale, Tensor) and self.scale.ndim == 2 else None

    @property
    def signed(self) -> Levels:
        """The same as int8."""
        if self.q.dtype == torch.int8:
            return self
        return Levels((self.q ^ 128).view(torch.int8), self.scale, self.zero - 128)

    def values(self) -> Tensor:
        return (self.q.float() - self.zero) * self.scale


@dataclass
class Present:
    """What the layers of a denoiser know of the call they are in, and the last input that was quantized.

    Projections of the same tensor (query, key and value) follow one another, so one is enough to quantize it once.
    """

    bucket: int | None = None
    clocked: bool = False  # whether somebody who knows the step sets the bucket
    by_clock: bool = True  # whether layers may be timed: not where ranks must agree, nor for what is compiled
    times: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)  # milliseconds by shape, candidate
    used: dict[str, int] = field(default_factory=dict, repr=False)  # layers by the shape that settled them
    _last: tuple[Any, ...] = field(default=(), repr=False)
    _at: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "bucket":
            for at in vars(self).get("_at", {}).values():
                at.fill_(-1 if value is None else value)

    def at(self, device: torch.device) -> Tensor:
        """The bucket as a tensor [1], -1 outside of a run: written once a step, read by graphs."""
        if device not in self._at:
            self._at[device] = torch.full((1,), -1 if self.bucket is None else self.bucket, device=device)
        return self._at[device]

    def shared(self, x: Tensor, key: Hashable, make: Callable[[], Levels]) -> Levels:
        """`make()`, or what it gave for the same unchanged tensor and key."""
        if torch.compiler.is_compiling() or x.is_inference():  # inference tensors do not tell of changes in place
            return make()
        if self._last and self._last[0]() is x and self._last[1:3] == (x._version, key):
            return self._last[3]
        made = make()
        self._last = (weakref.ref(x), x._version, key, made)
        return made

    def forget(self) -> None:
        self._last = ()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have inputs of their own."""
        return {**self.__dict__, "_last": (), "_at": {}, "clocked": False}


def rows_of(x: Tensor, layer: nn.Module) -> Tensor:
    """What a layer is given as [n, channels]; a view where the memory format allows.

    Channels come first in the pictures [b, channels, h, w] or [channels, h, w] of a convolution, and last for any other
    layer: the layer tells, as a shape of four dimensions may be either.
    """
    if isinstance(layer, nn.Conv2d):
        x = batched(x).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return x.reshape(-1, x.shape[-1])


def shaped(rows: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    """Rows [n, c] in the shape of x, a batch, with c channels; pictures are channels last in memory."""
    if not isinstance(layer, nn.Conv2d):
        return rows.view(*x.shape[:-1], -1)
    batch, _, height, width = x.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def channels_of(layer: nn.Module) -> int:
    """The dimension of what a layer takes and gives that holds its channels."""
    return -3 if isinstance(layer, nn.Conv2d) else -1


def given_to(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a Linear or Conv2d is called with, by place or by name."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def batched(x: Tensor) -> Tensor:
    """A picture [channels, h, w] as a batch of one."""
    return x[None] if x.ndim == 3 else x


def scale_and_zero(low: float, high: float, top: int) -> tuple[float, int]:
    """Of levels 0 .. top for a range."""
    scale = max(high - low, 1e-12) / top
    return scale, min(max(round(-low / scale), 0), top)


def between(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The same of edges that are tensors, which nothing reads."""
    scale = (high - low).clamp_min(1e-12) / top
    return scale, (-low / scale).round().clamp(0, top)


def range_of(rows: Tensor, top: int, inverse: Tensor | None = None) -> Range:
    """Scale and zero of the tensor's own range, which always holds 0. NaN makes the scale, and so all values, NaN."""
    edges = torch.aminmax(rows if inverse is None else rows * inverse)
    if _launched(rows):  # to read the edges would be a wait
        return between(edges[0].float().clamp_max(0), edges[1].float().clamp_min(0), top)
    least, most = (float(edge) for edge in edges)
    if not abs(most - least) < float("inf"):
        return float("nan"), 0
    return scale_and_zero(min(least, 0.0), max(most, 0.0), top)


def quantized(rows: Tensor, top: int, inverse: Tensor | None = None, own: Range | None = None) -> Levels:
    """Levels 0 .. top of a range; without one symmetric levels around top // 2 + 1, with a float32 scale for each row,
    which NaN makes NaN. `inverse` [channels] multiplies the input first."""
    if own is not None:
        scale, zero = own
        return Levels(_rounded(rows, 1 / scale if inverse is None else inverse / scale, zero, top), scale, zero)
    rows = rows if inverse is None else rows * inverse
    scale = (rows.abs().amax(-1, keepdim=True).float() / (top // 2)).clamp_min(1e-12)
    return Levels(_rounded(rows, 1 / scale, top // 2 + 1, top), scale, top // 2 + 1)


Quantize = Callable[[Tensor, int, Tensor | None, Range | None], Levels]  # as `quantized`


def _launched(rows: Tensor) -> bool:
    """Whether values are not at hand: they are a device's, or a graph's."""
    return rows.device.type != "cpu" or torch.compiler.is_compiling()


def _rounded(rows: Tensor, factor: float | Tensor, zero: int | Tensor, top: int) -> Tensor:
    """round(rows * factor) + zero within 0 .. top as uint8: three passes over as much as the cache holds."""
    if _launched(rows):  # where one kernel is made of it, or none can be
        return (rows.float() * factor + (zero + 0.5)).clamp(0, top).to(torch.uint8)
    step = max(1, _CHUNK // max(1, rows.shape[-1]))
    found = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    half = float(zero) + 0.5
    for start in range(0, len(rows), step):
        part = rows[start : start + step].float()
        if isinstance(factor, float):
            scaled = torch.add(part.new_full((), half), part, alpha=factor)
        else:
            scaled = (part * (factor if factor.ndim == 1 else factor[start : start + step])).add_(half)
        # The cast cuts what comes after the point; through 16 bits, as there is no fast one to 8 without a sign.
        found[start : start + step] = scaled.clamp_(0, top).to(torch.int16)
    return found
