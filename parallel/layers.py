"""Rules for layers that look beyond their own rows: convolutions and group normalization.

Source: DistriFusion, https://arxiv.org/abs/2402.19481, section 4. Unlike the authors' code the statistics are those of
nn.GroupNorm (biased, in float32), weighted by the rows of each rank, and halos go to neighbours only. Where every step
waits, the halo of a convolution that follows a normalization travels with the statistics: one message less to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UnsupportedModel
from fastdiff.patch import PatchSet

from .borders import bordered, followed, follower, is_conv, rows
from .split import Split


def split_layers(split: Split, root: nn.Module, patches: PatchSet) -> None:
    """Patch every convolution and group normalization of a model. Raises UnsupportedModel, with the reason."""
    after = followed(root)
    for name, module in root.named_modules():
        if not split.once(module, "layer"):
            continue
        if isinstance(module, nn.GroupNorm):
            _group_norm(split, name, module, after.get(id(module)), patches)
        elif is_conv(module):
            _check(name, module)
            if module.kernel_size[-2] > 1:
                _conv(split, name, module, patches)


def _check(name: str, conv: Any) -> None:
    if getattr(conv, "padding_mode", "zeros") != "zeros" or not isinstance(conv.padding, tuple):
        raise UnsupportedModel(
            f"{name} pads with {getattr(conv, 'padding_mode', conv.padding)!r}; patches can be split with zeros only"
        )


def _conv(split: Split, name: str, conv: Any, patches: PatchSet) -> None:
    """Rows of the neighbours are put above and below; zeros at the edges of the picture, as the padding would."""
    exchange = split.exchange(name, "halo")
    size, stride, dilation, padding = (
        value[-2] for value in (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
    )
    above, below = padding, max(0, dilation * (size - 1) + 1 - stride - padding)

    def halo(shape: Sequence[int], x: Tensor) -> Tensor:
        up, down = split.neighbour(-1), split.neighbour(1)
        if x.shape[-2] < max(above, below):
            raise UnsupportedModel(f"{name} needs {max(above, below)} rows of each neighbour; patches are smaller")
        sends: dict[int, Tensor] = {}
        shapes: dict[int, tuple[int, ...]] = {}
        if up is not None:
            sends |= {up: x[..., :below, :]} if below else {}
            shapes |= {up: rows(x, above)} if above else {}
        if down is not None:
            sends |= {down: x[..., x.shape[-2] - above :, :]} if above else {}
            shapes |= {down: rows(x, below)} if below else {}
        got = split.swap(exchange, sends, shapes, x.dtype)
        top = got.get(up) if up is not None else x.new_zeros(rows(x, above))
        bottom = got.get(down) if down is not None else x.new_zeros(rows(x, padding))
        return torch.cat([part for part in (top, x, bottom) if part is not None], -2)

    talk = split.hidden(halo)

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def halo_forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # by the name it has in the layer
            x = input
            if not split.active:
                return forward(x, *args, **kwargs)
            if split.bordered is conv:
                split.bordered = None
                whole = F.pad(x, (0, 0, int(split.neighbour(-1) is None), int(split.neighbour(1) is None)))
            else:
                more = above + (padding if split.neighbour(1) is None else below)
                whole = talk(rows(x, x.shape[-2] + more), x)
            old = conv.padding
            object.__setattr__(conv, "padding", (*old[:-2], 0, old[-1]))
            try:
                return forward(whole, *args, **kwargs)
            finally:
                object.__setattr__(conv, "padding", old)

        return halo_forward

    patches.wrap_forward(conv, wrapper)


def _group_norm(
    split: Split, name: str, norm: nn.GroupNorm, place: tuple[Any, str] | None, patches: PatchSet
) -> None:  # fmt: skip
    exchange = split.exchange(name, "norm")

    def told(shape: Sequence[int], own: Tensor) -> Tensor:
        got = split.swap(exchange, dict.fromkeys(split.peers, own), dict.fromkeys(split.peers, own.shape), own.dtype)
        slot = exchange.slot(split.step)
        whole = _whole(own, list(got.values()), slot.own)
        slot.own = own.clone()  # a graph uses its memory again
        return torch.stack(whole)

    talk = split.hidden(told)

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def norm_forward(input: Tensor) -> Tensor:
            x = input
            if not split.active:
                return forward(x)
            wide = (x if x.dtype == torch.float64 else x.float()).contiguous()
            (batch, channels), pixels = x.shape[:2], x[0, 0].numel()
            mean, variance = _moments(wide, norm.num_groups)
            # where rows differ, a rank counts as much as its pixels
            own = torch.stack([mean, variance, torch.full_like(mean, pixels)])
            if (conv := follower(split, place)) is not None:
                others, x = bordered(split, exchange, x, own)
                mean, variance = _whole(own, others, None)
                split.bordered, wide, pixels = conv, x.to(wide.dtype), x[0, 0].numel()
            else:
                mean, variance = talk((2, *own.shape[1:]), own)
            # with its statistics given, each channel of each image is normalized in one pass
            mean, variance = (v.repeat_interleave(channels // norm.num_groups, 1).flatten() for v in (mean, variance))
            scale, shift = (None if p is None else p.to(wide.dtype).repeat(batch) for p in (norm.weight, norm.bias))
            flat = (wide if x.is_cpu else x).reshape(1, batch * channels, pixels)  # GPUs widen as they go
            y = F.batch_norm(flat, mean, variance, scale, shift, eps=norm.eps)
            return y.reshape(x.shape).to(x.dtype)

        return norm_forward

    patches.wrap_forward(norm, wrapper)


def _moments(wide: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of each image."""
    if not wide.is_cpu:
        variance, mean = torch.var_mean(wide.reshape(len(wide), groups, -1), -1, correction=0)
        return mean, variance
    # many times faster than var_mean on CPUs; of the normalized tensor it makes too there is no use
    batch, channels, pixels = len(wide), wide.shape[1], wide[0, 0].numel()
    _, mean, root = torch.native_group_norm(wide, None, None, batch, channels, pixels, groups, 0.0)
    return mean, root.square().reciprocal()


def _whole(own: Tensor, others: list[Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance over all ranks. With `before`, the others' statistics are those of the step before: then
    theirs and our own of that step, and on top how far our own have moved since (corrected asynchronous GroupNorm)."""
    known = [before if before is not None else own, *others]
    parts = torch.stack(known)
    share = parts[:, 2] / parts[:, 2].sum(0)
    mean = (parts[:, 0] * share).sum(0)
    if before is None:  # by Chan's formula, which does not cancel
        return mean, ((parts[:, 1] + (parts[:, 0] - mean) ** 2) * share).sum(0)
    square = ((parts[:, 1] + parts[:, 0] ** 2) * share).sum(0)
    mean = mean + own[0] - before[0]
    variance = square + own[1] + own[0] ** 2 - before[1] - before[0] ** 2 - mean**2
    return mean, torch.where(variance < 0, own[1], variance)
