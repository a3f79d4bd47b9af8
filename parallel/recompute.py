"""A step of a pipeline again, at other latents: what lies between its latents, its denoiser and its solver is the
pipeline's own code, and is read off what passed there once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.affine import wide

Call = tuple[Callable[..., Any], tuple, dict[str, Any], Any]  # a denoiser's forward, its arguments, what it gave


def recompute(calls: Sequence[Call], given: Tensor, output: Tensor, latents: Tensor) -> Tensor | None:
    """What the solver would have been given at `latents`, where it was given `output` at the latents `given`.

    Pipelines scale the latents for the denoiser, and add up what it gave with the weights of guidance: both are linear,
    so that least squares tell the numbers. None where they do not fit.
    """
    before = [part for call in calls for part in _parts(_first(call[3]), output)]
    weights = _weights(before, output)
    after: list[Tensor] = []
    for forward, args, kwargs, _ in calls:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        place = next((k for k, leaf in enumerate(leaves) if _is_batch(leaf)), None)
        if weights is None or place is None:
            return None
        sample = leaves[place] = leaves[place].clone()
        for part in _parts(sample, given):
            scale = _weights([given], part)
            if scale is None:
                return None
            part.copy_(scale[0] * latents)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        after += _parts(_first(forward(*args, **kwargs)), output)
    assert weights is not None
    return sum((w * part for w, part in zip(weights, after, strict=True)), torch.zeros_like(output)).to(output.dtype)


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 1


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(output) if _is_batch(leaf))


def _parts(batch: Tensor, like: Tensor) -> list[Tensor]:
    """Views of a batch, each like the latents: halves of guidance, without channels that are not the latents'."""
    return [part[:, : like.shape[1]] for part in batch.split(len(like))]


def _weights(parts: Sequence[Tensor], whole: Tensor) -> list[float] | None:
    """Numbers with which the parts add up to the whole, to rounding; None where there are none."""
    if any(part.shape != whole.shape for part in parts):
        return None
    columns = torch.stack([wide(part.flatten()).cpu() for part in parts], 1)
    wanted = wide(whole.flatten()).cpu()
    found = torch.linalg.lstsq(columns, wanted[:, None], driver="gelsd").solution[:, 0]
    far = (columns @ found - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return found.tolist() if far < torch.finfo(whole.dtype).eps ** 0.5 else None
