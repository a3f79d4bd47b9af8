"""What is on the wire for keys and values. Residual coding: CompactFusion, https://arxiv.org/abs/2507.17511."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Codec

CHANGES = ("residual", "residual2")  # codecs of what changed since the last message
_LEVELS = (0.4528, 1.5104)  # of 2 bits, either sign, for a normal distribution of variance 1 (Lloyd, Max)
_BETWEEN = 0.9816


def packed_size(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype, first: bool = False) -> int:
    """Bytes of a tensor on the wire; `first` is the message that residuals start from."""
    count, rows = torch.Size(shape).numel(), torch.Size(shape[:-1]).numel()
    if codec == "raw" or (codec in CHANGES and first):
        return count * dtype.itemsize
    if codec == "residual2":
        return rows * (2 + -(-shape[-1] // 4))
    return rows * 4 + (count if codec == "int8" else rows * ((shape[-1] + 1) // 2))


class Wire:
    """One direction between two ranks for one slot: both ends keep what the receiver has, so errors do not add up."""

    def __init__(self, codec: Codec) -> None:
        self.codec: Codec = codec
        self.known: Tensor | None = None

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return packed_size(self.codec, shape, dtype, self.known is None)

    def pack(self, value: Tensor) -> Tensor:
        """Bytes of a value; of its difference to the last one, with the error fed back, for residuals."""
        if self.codec == "raw":
            return raw(value)
        if self.codec == "int8":
            return _quantized(value, 127)
        if self.known is None:
            self.known = value.clone()
            return raw(value)
        change = value - self.known
        message = _in_two_bits(change) if self.codec == "residual2" else _quantized(change, 7)
        self.known = self.known + self._change(message, value.shape, value.dtype)
        return message

    def unpack(self, message: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.codec == "int8":
            return _restored(message, shape, dtype, 127)
        if self.codec == "raw" or self.known is None:
            value = message.view(dtype).reshape(shape)
            self.known = value if self.codec in CHANGES else None
            return value
        self.known = self.known + self._change(message, shape, dtype)
        return self.known

    def _change(self, message: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        two = self.codec == "residual2"
        return _from_two_bits(message, shape, dtype) if two else _restored(message, shape, dtype, 7)


def raw(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _quantized(value: Tensor, top: int) -> Tensor:
    """Integers in [-top, top], a scale in float32 for each row (the last dimension); two to a byte where top is 7."""
    rows = value.float().reshape(-1, value.shape[-1])
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / top
    whole = torch.round(rows / scale).to(torch.int8)
    if top == 7:
        whole = torch.nn.functional.pad(whole + 8, (0, whole.shape[-1] % 2)).view(torch.uint8)
        whole = whole[:, ::2] | (whole[:, 1::2] << 4)
    return torch.cat([raw(scale), raw(whole)])


def _restored(message: Tensor, shape: tuple[int, ...], dtype: torch.dtype, top: int) -> Tensor:
    rows, width = torch.Size(shape[:-1]).numel(), shape[-1]
    scale, whole = message[: rows * 4].view(torch.float32).reshape(rows, 1), message[rows * 4 :].reshape(rows, -1)
    if top == 7:
        pairs = torch.stack([whole & 15, whole >> 4], -1).reshape(rows, -1)[:, :width]
        numbers = pairs.float() - 8
    else:
        numbers = whole.view(torch.int8).float()
    return (numbers * scale).to(dtype).reshape(shape)


def _in_two_bits(change: Tensor) -> Tensor:
    """A scale in bfloat16 for each row, its root mean square, and four numbers to a byte: size, and twice the sign."""
    rows = change.float().reshape(-1, change.shape[-1])
    scale = rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30).bfloat16()
    codes = (rows.abs() > _BETWEEN * scale.float()).to(torch.uint8) | ((rows < 0).to(torch.uint8) << 1)
    codes = torch.nn.functional.pad(codes, (0, -rows.shape[-1] % 4))
    return torch.cat([raw(scale), raw(codes[:, ::4] | codes[:, 1::4] << 2 | codes[:, 2::4] << 4 | codes[:, 3::4] << 6)])


def _from_two_bits(message: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    rows, width = torch.Size(shape[:-1]).numel(), shape[-1]
    scale, packed = message[: rows * 2].view(torch.bfloat16).reshape(rows, 1), message[rows * 2 :].reshape(rows, -1)
    codes = torch.stack([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], -1).reshape(rows, -1)[:, :width]
    small, large = _LEVELS
    sizes = small + (large - small) * (codes & 1).float()
    return (sizes * (1 - (codes & 2).float()) * scale.float()).to(dtype).reshape(shape)
