"""What a rank of a parallel run will hold of weights, counted from the heads of a model's files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastdiff.parallel.base import ParallelMethod
from fastdiff.parallel.shards import units
from fastdiff.parallel.sharing import Blocks

from .portioned import empties
from .quantized_parts import is_quantized, type_of
from .stored import Stored, stored, variant

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDE = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # bytes of a number; of what is not here, 1
_SMALL = 4.5  # bits of a weight in w4a16, with the scales of its groups


@dataclass(frozen=True)
class Room:
    """Bytes of one rank of `ranks`: weights that it keeps, among them `shares` of blocks; blocks that are `gathered` at
    a time; the most while it loads. Of all that `mapped` may be pages of files, which ranks on a CPU have in common."""

    ranks: int
    weights: int
    shares: int
    gathered: int
    loading: int
    mapped: int

    @property
    def peak(self) -> int:
        """The most, of weights alone."""
        return max(self.weights + self.gathered, self.loading)

    def __str__(self) -> str:
        shared = f" ({gib(self.shares)} of it its shares of blocks), {gib(self.gathered)} of gathered blocks"
        own = f"{gib(self.weights)} of weights{shared if self.shares else ''}"
        return f"each of {self.ranks} ranks will hold {own}, {gib(self.peak)} at most"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights as they will be in memory, those that lie in files like that (`mapped`), of them all
    but denoisers' (`others`), the denoisers' blocks, and how many bytes a weight has."""

    total: int
    mapped: int
    others: int
    blocks: tuple[Blocks, ...]
    itemsize: int

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype) -> Sizes:
        """Of a pipeline's directory, whose floats will be of a type, but for what a class keeps in another."""
        known = {anatomy.component: anatomy for anatomy in empties(folder, dtype)}
        kind, packed, total, mapped, others = variant(folder), is_quantized(folder), 0, 0, 0
        blocks = list[Blocks]()
        for part in sorted(path for path in folder.iterdir() if path.is_dir()):
            tensors, anatomy = stored(part, kind), known.get(part.name)
            module = nn.Module() if anatomy is None else anatomy.denoiser
            sized = {name: _bytes(name, one, module, None if packed else dtype) for name, one in tensors.items()}
            as_is = sum(size for size, same in sized.values() if same)
            total, mapped = total + sum(size for size, _ in sized.values()), mapped + as_is
            others += as_is if anatomy is None else 0
            if anatomy is not None and Blocks.of(anatomy, ()).sizes:
                paths = {id(module): f"{path}." for path, module in module.named_modules()}
                heads = [paths[id(unit)] for unit in units(anatomy)]
                blocks.append(Blocks(tuple(sum(s for n, (s, _) in sized.items() if n.startswith(h)) for h in heads)))
        return cls(total, mapped, others, tuple(blocks), dtype.itemsize)

    def room(self, method: ParallelMethod | None, ranks: int, by_shares: bool = True) -> Room:
        """by_shares: whether what a rank does not keep is never read; else it has all of it first."""
        if method is None or not method.shard:
            return Room(ranks, self.total, 0, 0, self.total, self.mapped)
        shares, gathered = (sum(getattr(b, n)(ranks) for b in self.blocks) for n in ("kept", "here"))
        weights = self.total - sum(sum(b.sizes) for b in self.blocks) + shares
        loading, mapped = (weights, self.others) if by_shares else (self.total, self.mapped)
        return Room(ranks, weights, shares, gathered, loading, mapped)

    def smaller(self) -> Sizes:
        """With blocks of 4 bits, which no file is like."""
        scale = _SMALL / 8 / self.itemsize
        blocks = tuple(replace(b, sizes=tuple(round(size * scale) for size in b.sizes)) for b in self.blocks)
        spared = sum(sum(old.sizes) - sum(new.sizes) for old, new in zip(self.blocks, blocks, strict=True))
        return replace(self, total=self.total - spared, mapped=self.others, blocks=blocks)


def gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"


def _bytes(name: str, one: Stored, module: nn.Module, dtype: torch.dtype | None) -> tuple[int, bool]:
    """Of a tensor in memory, and whether the file has the very same; dtype: None where it is read as it is."""
    there = _TYPES.get(one.dtype)
    here = there if there is None or dtype is None else type_of(name, module, dtype)
    size = _WIDE.get(one.dtype, 1) if here is None else here.itemsize
    return math.prod(one.shape) * size, here == there
