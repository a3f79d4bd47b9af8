"""How weights are stored: integers or small floats with scales, as plain tensors, at an exact number of bytes.

A weight is a matrix [outputs, inputs]; a convolution's kernel is flattened behind its input channels. Grouped formats
have a scale for each `group` weights of a row; the last group is filled up with zeros where the group does not divide
the row, and a row shorter than a group is one group. Two 4-bit numbers share a byte, the first in the low half;
those of 2 and 3 bits, which only the normal grid has, are eight to 2 and 3 bytes.

Sources: dual-grained 4 bit, https://arxiv.org/abs/2310.04836; Hadamard rotation and MSE-optimal grid (HIGGS),
https://arxiv.org/abs/2411.17525.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.errors import UnknownName

from .grids import from_bytes, in_bytes, normal_levels
from .rounding import (
    Rounding,
    best_scale,
    from_nibbles,
    group_of,
    hadamard,
    in_groups,
    nibbles,
    power_of_two,
    to_integers,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Format(ABC):
    """One way to store a weight [n, k]. `pack` and `unpack` are inverse up to rounding."""

    name: str
    bits: int

    @abstractmethod
    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        """Plain tensors that hold a float32 weight [n, k]."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k] that the tensors stand for, rounded once to a type; `inputs` is k."""

    def bytes(self, outputs: int, inputs: int, group: int) -> int:
        """Bytes of all tensors of a weight [outputs, inputs]: packed without numbers."""
        packed = self.pack(torch.empty(outputs, inputs, device="meta"), group, "nearest")
        return sum(tensor.nbytes for tensor in packed.values())


class Integers(ABC):
    """A format that 8-bit kernels can run: each weight is an 8-bit integer times the scale of its output."""

    @abstractmethod
    def eight_bits(self, tensors: Mapping[str, Tensor], inputs: int) -> Tensor:
        """The weight in units of its scale: int8 [n, k]."""

    @abstractmethod
    def back(self, integers: Tensor, tensors: Mapping[str, Tensor], group: int) -> Tensor:
        """The tensor `q` that `eight_bits` was made of; exact. A kernel that has packed them need not keep both."""


@dataclass(frozen=True)
class Int8(Format, Integers):
    """Symmetric 8 bit with a float32 scale for each output: q int8 [n, k], scale [n]. Clipping gains nothing here."""

    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return self.store(to_integers(weight, scale, -127, 127), scale)

    def store(self, integers: Tensor, scale: Tensor) -> Tensors:
        """integers [n, k] in -127 .. 127 and scale [n, 1], however they were found."""
        return {"q": integers.to(torch.int8), "scale": scale[:, 0].contiguous()}

    def eight_bits(self, tensors: Mapping[str, Tensor], inputs: int) -> Tensor:
        return tensors["q"]

    def back(self, integers: Tensor, tensors: Mapping[str, Tensor], group: int) -> Tensor:
        return integers

    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return _times(tensors["q"], tensors["scale"][:, None], dtype)


@dataclass(frozen=True)
class Int4(Format):
    """Symmetric 4 bit in groups: q uint8 [n, k' / 2], scale float16 [n, groups], which may be negative: -8 is then
    the largest weight of its group, whatever its sign."""

    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        grouped = in_groups(weight, group)
        top = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        scale = best_scale(grouped, -top / 8, -8, 7, rounding).half().float()
        return self.store(to_integers(grouped, scale, -8, 7), scale)

    def store(self, integers: Tensor, scale: Tensor) -> Tensors:
        """integers [n, groups, group] in -8 .. 7 and scale [n, groups, 1], however they were found."""
        return {"q": nibbles((integers + 8).flatten(1)), "scale": scale[..., 0].half()}

    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        scale = tensors["scale"].float()
        integers = (from_nibbles(tensors["q"]).view(torch.int8) - 8).unflatten(-1, (scale.shape[1], -1))
        return _times(integers, scale[..., None], dtype).flatten(1)[:, :inputs]


@dataclass(frozen=True)
class Dual4(Format, Integers):
    """Dual-grained 4 bit: (q - zero) * step is an 8-bit integer for each weight, so that 8-bit kernels run it.

    q uint8 [n, k' / 2]; step and zero, 4 bits each, share a byte: group uint8 [n, groups]; scale float32 [n].
    """

    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        grouped = in_groups(weight, group)
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        wished = ((high - low) / 15).clamp_min(1e-12)
        zero = (-low / wished).round().clamp(0, 15)
        wished = best_scale(grouped, wished, -zero, 15 - zero, rounding)
        largest = 127 // torch.maximum(zero, 15 - zero)  # of a step, for an 8-bit product
        best: tuple[Tensor, ...] | None = None
        for steps in range(4, 16):
            scale = wished.amax(1, keepdim=True) / steps
            step = torch.minimum((wished / scale).round().clamp(1, 15), largest)
            integers = to_integers(grouped, scale * step, -zero, 15 - zero)
            error = (integers * scale * step - grouped).square().sum((1, 2), keepdim=True)
            found = (error, integers + zero, scale, step)
            best = found if best is None else _smaller(found, best)
        assert best is not None
        _, integers, scale, step = best
        packed = (zero + 16 * step)[..., 0].to(torch.uint8)
        return {"q": nibbles(integers.flatten(1)), "group": packed, "scale": scale[:, 0, 0].contiguous()}

    def eight_bits(self, tensors: Mapping[str, Tensor], inputs: int) -> Tensor:
        packed = tensors["group"][..., None]
        zero, step = (packed & 15).view(torch.int8), (packed >> 4).view(torch.int8)
        integers = from_nibbles(tensors["q"]).view(torch.int8).unflatten(-1, (packed.shape[1], -1))
        return ((integers - zero) * step).flatten(1)[:, :inputs].contiguous()  # as kernels want it

    def back(self, integers: Tensor, tensors: Mapping[str, Tensor], group: int) -> Tensor:
        packed = tensors["group"].to(torch.int16)[..., None]
        grouped = in_groups(integers.to(torch.int16), group)
        return nibbles((grouped // (packed >> 4) + (packed & 15)).flatten(1))

    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return _times(self.eight_bits(tensors, inputs), tensors["scale"][:, None], dtype)


@dataclass(frozen=True)
class Normal(Format):
    """Groups turned by a Hadamard matrix with random signs look normal; 16, 8 or 4 levels that are optimal for that.

    q uint8 are level numbers, `bits` for each of the k' weights of a row (`grids.in_bytes`), scale float16 [n, groups]
    the groups' root mean squares, signs int8 [k'].
    Groups are powers of two. `rounding` is always to the nearest level.
    """

    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        grouped = in_groups(weight, power_of_two(group_of(weight.shape[1], group)[0]))
        signs = self._signs(grouped.shape[1] * grouped.shape[2]).to(weight.device)
        turned = hadamard(grouped * signs.view(grouped.shape[1:]))
        scale = turned.square().mean(-1, keepdim=True).sqrt().half().float()
        levels = normal_levels(self.bits, weight.device)
        numbers = torch.bucketize(turned / scale.clamp_min(1e-12), (levels[1:] + levels[:-1]) / 2)
        return {"q": in_bytes(numbers.flatten(1), self.bits), "scale": scale[..., 0].half(), "signs": signs}

    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        scale, signs = tensors["scale"].float(), tensors["signs"].float()
        numbers = from_bytes(tensors["q"], self.bits, len(signs)).long()
        values = normal_levels(self.bits, scale.device)[numbers].unflatten(-1, (scale.shape[1], -1))
        return (hadamard(values * scale[..., None]).flatten(1) * signs)[:, :inputs].to(dtype)

    def _signs(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(0, 2, (length,), generator=generator, dtype=torch.int8) * 2 - 1


@dataclass(frozen=True)
class Float8(Format):
    """E4M3 floats with a float32 scale for each output: q float8_e4m3fn [n, k], scale [n]."""

    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        scale = (weight.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12)
        return {"q": (weight / scale).to(torch.float8_e4m3fn), "scale": scale[:, 0].contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return _times(tensors["q"].to(dtype), tensors["scale"][:, None], dtype)


@dataclass(frozen=True)
class Half(Format):
    """Plain float16: q [n, k]."""

    def pack(self, weight: Tensor, group: int, rounding: Rounding) -> Tensors:
        return {"q": weight.half()}

    def unpack(self, tensors: Mapping[str, Tensor], inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return tensors["q"].to(dtype)


FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Int8("int8", 8),
        Int4("int4", 4),
        Dual4("dual4", 4),
        Normal("normal4", 4),
        Normal("normal3", 3),
        Normal("normal2", 2),
        Float8("float8", 8),
        Half("half", 16),
    )
}


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise UnknownName("weight format", name, FORMATS)
    return FORMATS[name]


def _smaller(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each row, the one of two findings whose error, the first of them, is smaller."""
    return tuple(torch.where(a[0] < b[0], one, other) for one, other in zip(a, b, strict=True))


def _times(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers * scale, multiplied in float32 and written in the type asked for: one pass over a weight, none of it
    in float32 on the way."""
    return torch.mul(numbers, scale, out=torch.empty_like(numbers, dtype=dtype))
