"""A denoiser of which a rank has its shares of the blocks and no more, since nothing else of them was ever read.

What `shards` does to a model that is here, done while it is read: vLLM-Omni found that ranks which load all of a model
first run out of memory before any of it is shared out (its issues 4635 and 7013).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import BadConfig, UnsupportedModel

from .kept import Kept, View, aligned, share_of

_NAME = "_fastdiff_portion"  # where a denoiser keeps what it has of its blocks
Rows = Callable[[str, int, int], Tensor]  # of a tensor by its name, from one to before another; all of a single number


@dataclass(eq=False)
class Portion:
    """What rank `rank` of so many has. digest: of values from all over the model, the same on all ranks; `used`:
    whether blocks fetch their weights, without which all they have is numbers that are none."""

    rank: int
    ranks: int
    kept: list[Kept]
    digest: int
    used: bool = False

    def attach(self, root: nn.Module) -> None:
        """From now on the denoiser refuses calls that nobody gathers weights for."""
        setattr(root, _NAME, self)
        root.register_forward_pre_hook(self._refuse)

    def lend(self, rank: int, ranks: int) -> list[Kept]:
        """The shares, for blocks that fetch the others. Raises BadConfig for another rank, or number of them."""
        if (rank, ranks) != (self.rank, self.ranks):
            raise BadConfig(
                f"this is share {self.rank} of {self.ranks} of a model's blocks, and not for rank {rank} of {ranks}: "
                "load the model again"
            )
        self.used = True
        return self.kept

    def take_back(self) -> None:
        """As it was loaded: what is gathered is let go, and no rank needs the others for that."""
        self.used = False
        for kept in self.kept:
            kept.here = kept.coming = None

    def _refuse(self, root: nn.Module, _: Any) -> None:
        if not self.used:
            raise UnsupportedModel(_alone(root, self))


def portion(root: nn.Module) -> Portion | None:
    """What a denoiser has of its blocks, if it was loaded by shares."""
    return vars(root).get(_NAME)


def require_shard(root: nn.Module, method: Any) -> None:
    """Raises BadConfig where a denoiser has shares, and the parallel method, if any, gathers none."""
    own = portion(root)
    if own is not None and (method is None or not method.shard):
        raise BadConfig(_alone(root, own))


def _alone(root: nn.Module, own: Portion) -> str:
    return (
        f"this {type(root).__name__} was loaded as share {own.rank} of {own.ranks}: accelerate its pipeline with "
        "parallel.shard = blocks, on all ranks, or load it without"
    )


def read_blocks(
    blocks: Sequence[nn.Module], root: nn.Module, rank: int, ranks: int, device: torch.device, rows: Rows
) -> list[Kept]:
    """Read a rank's share of each block's parameters, which are on the meta device in the type that they will have.

    Of a tensor only the rows are read that the share begins, ends or goes on in. Shares are those that `Shelf` cuts out
    of a model that is here. Buffers stay where they are.
    """
    number = {id(module): k for k, block in enumerate(blocks) for module in block.modules()}
    held: list[list[tuple[nn.Module, str, str]]] = [[] for _ in blocks]
    for path, module in root.named_modules():
        if (k := number.get(id(module))) is not None:
            own = [name for name, tensor in module._parameters.items() if tensor is not None and tensor.numel()]
            held[k] += [(module, name, f"{path}.{name}") for name in own]
    return [_block(k, own, rank, ranks, device, rows) for k, own in enumerate(held)]


def _block(
    number: int, own: list[tuple[nn.Module, str, str]], rank: int, ranks: int, device: torch.device, rows: Rows
) -> Kept:
    places: list[Any] = [module._parameters[name] for module, name, _ in own]
    size, begin = share_of(sum(aligned(like.nbytes) for like in places), ranks), 0
    kept = Kept(number, device, size, torch.zeros(size, dtype=torch.uint8, device=device))
    for (module, name, path), like in zip(own, places, strict=True):
        low, high = max(0, rank * size - begin), min(like.nbytes, (rank + 1) * size - begin)
        if low < high:
            row = like.nbytes // (len(like) if like.ndim else 1)
            read = rows(path, low // row, -(-high // row)).reshape(-1).view(torch.uint8)
            kept.share[begin + low - rank * size :][: high - low] = read[low % row :][: high - low]
        here = nn.Parameter(torch.empty(0, dtype=like.dtype, device=device), requires_grad=like.requires_grad)
        module._parameters[name] = here
        kept.views.append(View(here, begin, like.dtype, tuple(like.shape), like.stride()))
        begin += aligned(like.nbytes)
    kept.empty()
    return kept
