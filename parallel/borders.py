"""Borders of convolutions that travel with the statistics of the normalization before them: one message less to wait
for, where every step waits. Who has the statistics of all ranks normalizes a neighbour's row itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .codec import raw
from .exchange import Exchange
from .split import Split


def is_conv(module: Any) -> bool:
    """A convolution, quantized or not; peft's wrapper holds one and is none itself."""
    return all(hasattr(module, part) for part in ("kernel_size", "stride", "dilation", "padding")) and not hasattr(
        module, "base_layer"
    ) and isinstance(module.kernel_size, tuple) and len(module.kernel_size) >= 2  # fmt: skip


def rows(x: Tensor, count: int) -> tuple[int, ...]:
    return (*x.shape[:-2], count, x.shape[-1])


def followed(root: nn.Module) -> dict[int, tuple[Any, str]]:
    """Of normalizations whose output one convolution alone reads, behind functions of single numbers: where that is."""
    places = [(root, "conv_norm_out", "conv_out")]
    for module in root.modules():
        if getattr(module, "upsample", root) is None and getattr(module, "downsample", root) is None:
            places += [(module, f"norm{k}", f"conv{k}") for k in (1, 2)]
    return {id(getattr(m, norm)): (m, conv) for m, norm, conv in places if hasattr(m, norm) and hasattr(m, conv)}


def follower(split: Split, place: tuple[Any, str] | None) -> Any:
    """The convolution there, if its halo travels with the statistics."""
    if place is None or split.bus.opaque is not None or not split.method.fresh(split.method.warmup_steps + 1):
        return None
    conv = getattr(*place)
    alike = is_conv(conv) and (conv.kernel_size[-2], conv.stride[-2], conv.dilation[-2], conv.padding[-2])
    return conv if alike == (3, 1, 1, 1) else None


def bordered(split: Split, exchange: Exchange, x: Tensor, own: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the others have of `own`, and `x` with a row of each neighbour."""
    up, down, size, row = split.neighbour(-1), split.neighbour(1), own.nbytes, rows(x, 1)
    edges = {up: raw(x[..., :1, :]), down: raw(x[..., -1:, :])}
    sends = {peer: torch.cat([raw(own), *([edges[peer]] if peer in edges else [])]) for peer in split.peers}
    got = split.swap(exchange, sends, {peer: (len(sent),) for peer, sent in sends.items()}, torch.uint8)
    others = [told[:size].clone().view(own.dtype).view(own.shape) for told in got.values()]
    above, below = ([got[k][size:].clone().view(x.dtype).view(row)] if k is not None else [] for k in (up, down))
    return others, torch.cat([*above, x, *below], -2)
