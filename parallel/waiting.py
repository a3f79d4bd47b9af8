"""Which layers of a displaced method wait: those whose old values move the output most, for the bytes waited for.

The error model is linear: what one stale layer adds to the error of the denoiser's output does not depend on the
others, so that layers can be ranked alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from fastdiff.method import Settings

Table = Mapping[str, tuple[float, int]]


class LayerPlan(Settings):
    """Layers that wait, and the table they were chosen from: relative squared error of the output where that layer
    alone is a step old, and the bytes that a rank sends for it, a picture and step. `ranks` shared the picture."""

    version: Literal[1] = 1
    denoiser: str = Field(max_length=200, description="class and configuration of the model that was measured")
    ranks: int = Field(ge=2)
    budget: NonNegativeInt = Field(description="bytes that waiting layers may send, a picture and step")
    layers: tuple[str, ...]
    table: Mapping[str, tuple[NonNegativeFloat, NonNegativeInt]]

    @property
    def bytes(self) -> int:
        """What the chosen layers send."""
        return sum(self.table[name][1] for name in self.layers)

    def summary(self) -> str:
        errors = {name: error for name, (error, _) in self.table.items()}
        share = sum(errors[name] for name in self.layers) / (sum(errors.values()) or 1)
        told, every = (f"{size / 1e3:.4g}" for size in (self.bytes, sum(size for _, size in self.table.values())))
        return (
            f"{len(self.layers)} of {len(self.table)} layers wait, for {told} of {every} kB a picture and step; they "
            f"make {share:.0%} of the error that single old layers make"
        )


def chosen(table: Table, budget: int) -> tuple[str, ...]:
    """Layers in the order of their error for each byte, each that still fits the budget; none that make no error."""
    left, found = budget, []
    for name in ranked(table):
        error, size = table[name]
        if error > 0 and size <= left:
            found.append(name)
            left -= size
    return tuple(found)


def ranked(table: Table) -> Sequence[str]:
    """Names by error over bytes, the most first; of equal ones in the order of the table."""
    return sorted(table, key=lambda name: -table[name][0] / max(1, table[name][1]))
