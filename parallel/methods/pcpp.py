"""Partially Conditioned Patch Parallelism. Paper: https://arxiv.org/abs/2412.02962."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdiff.parallel.displaced import Displaced


class PCPP(Displaced):
    """Displaced patch parallelism in which attention sees its own patch and a portion of each neighbour.

    Unlike the authors' code, what is not seen is not sent, and the portion is cut at whole rows. `refresh` lets a rank
    see everything again every so many steps; `synchronous` takes the staleness away and leaves the bias.

    Formula: y_r = f(x_r; own z_i, the nearest p h rows of each neighbour's z_(i-1)) for the rows x_r of rank r; z are
    keys and values, h the neighbour's rows, p = `portion`, p h rounded up.
    """

    method: Literal["pcpp"] = "pcpp"
    portion: float = Field(0.3, ge=0, le=1, description="part of each neighbour's rows that is seen")
    synchronous: bool = Field(False, description="wait for this step's values always")

    @property
    def context(self) -> float | None:
        return self.portion

    def fresh(self, index: int, total: int | None = None) -> bool:
        return self.synchronous or self.whole(index, total)
