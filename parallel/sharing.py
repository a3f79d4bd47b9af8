"""What it changes in a plan that ranks keep shares of the blocks' weights (`shard`): less memory, more bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdiff.anatomy import Anatomy
from fastdiff.errors import UnsupportedModel
from fastdiff.weights import nbytes

from .base import ParallelMethod
from .kept import share_of
from .mesh import Topology
from .prediction import Prediction
from .shards import units


@dataclass(frozen=True)
class Blocks:
    """sizes: bytes of what is fetched at a time; calls: of the denoiser in a step, each of which fetches all of it."""

    sizes: tuple[int, ...] = ()
    calls: int = 1

    @classmethod
    def of(cls, anatomy: Anatomy, calls: Sequence[Any]) -> Blocks:
        """Empty where the blocks of the model are not known."""
        try:
            return cls(tuple(map(nbytes, units(anatomy))), len(calls))
        except UnsupportedModel:
            return cls()

    def helps(self, method: ParallelMethod) -> bool:
        """Whether the method could keep shares, and does not do without blocks already."""
        once = method.own_axis != "step" and not getattr(method, "halves", False)
        return bool(self.sizes) and not method.shard and once and method.leave is None

    def kept(self, ranks: int) -> int:
        """Bytes of a rank's shares."""
        return sum(share_of(size, ranks) for size in self.sizes)

    def here(self, ranks: int) -> int:
        """Bytes of the block that computes, and the next, on its way; in shares, which end alike on all ranks."""
        return sum(share_of(size, ranks) * ranks for size in sorted(self.sizes)[-2:])

    def spared(self, ranks: int) -> int:
        """Bytes that are not on a rank."""
        return max(0, sum(self.sizes) - self.kept(ranks) - self.here(ranks))

    def sent(self, mesh: Topology) -> int:
        """Bytes a step that a rank sends: its share of each block to all others, in each call that it computes."""
        once = sum(share_of(size, mesh.size) * (mesh.size - 1) for size in self.sizes)
        return once * max(1, self.calls // mesh.cfg)

    def shared_out(self, found: Prediction, mesh: Topology, link: float, steps: int) -> Prediction:
        """A prediction with shares of the weights, which travel while the block before them computes; what a displaced
        method sends travels on the same link. `refused` is left as it is."""
        sent, counted = self.sent(mesh), found.counted_kinds or {}
        others = 0 if found.exact else found.counted_bytes - counted.get("output", 0)
        late = steps * max(0.0, sent / link - max(0.0, found.rank_seconds - others / link))
        total = found.predicted_seconds + late
        return replace(
            found, settings=found.settings | {"shard": "blocks"}, counted_bytes=found.counted_bytes + sent,
            counted_bytes_warmup=found.counted_bytes_warmup + sent, counted_kinds=counted | {"weights": sent},
            predicted_seconds=total, predicted_step_seconds=total / steps,
            predicted_speedup=found.predicted_speedup * found.predicted_seconds / total,
            predicted_memory=found.predicted_memory - self.spared(mesh.size),
        )  # fmt: skip


NO_BLOCKS = Blocks()
