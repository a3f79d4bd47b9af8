"""Taking a denoiser's batch apart, or making it larger: every input that has the batch first, told by size and name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import NO_BATCH, Anatomy

from .region import tensors


class Batches:
    """What is known of the inputs of a denoiser's forward.

    A UNet for video may be given several rows an image (its frames), so for a UNet any multiple of the batch counts.
    """

    def __init__(self, anatomy: Anatomy, names: list[str]) -> None:
        self.anatomy, self.names = anatomy, names

    def size(self, args: tuple, kwargs: dict) -> int:
        """Rows of the latents, which are the first input; 0 where they are no single tensor."""
        first = args[0] if args else kwargs.get(self.names[0])
        return len(first) if isinstance(first, Tensor) and first.ndim > 1 else 0

    def change(
        self, args: tuple, kwargs: dict, batch: int, do: Callable[[Tensor], Tensor]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """The inputs with `do` made of those that hold the batch; None where one is not built like that."""
        if not self.anatomy.family.batches or not batch:
            return None
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        folds = self.anatomy.family.kind == "unet"
        out: dict[str, Any] = {}
        for name, value in named.items():
            if any(part in name for part in NO_BATCH):
                out[name] = value
                continue
            rows = [len(leaf) for leaf in tensors(pytree.tree_leaves(value)) if leaf.ndim > 0]
            fits = [count == batch or (folds and count % batch == 0) for count in rows]
            if not all(fits) and name != "timestep":
                return None
            out[name] = pytree.tree_map_only(Tensor, lambda leaf: do(leaf) if leaf.ndim > 0 else leaf, value)
        return tuple(out[name] for name in self.names[: len(args)]), {name: out[name] for name in kwargs}
