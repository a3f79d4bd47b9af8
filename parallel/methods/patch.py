"""Synchronous patch parallelism: DistriFusion's split without its staleness. Paper: https://arxiv.org/abs/2402.19481."""

from __future__ import annotations

from typing import Literal

from fastdiff.parallel.halves import ByTurns


class Patch(ByTurns):
    """Each rank computes its rows; every layer waits for what it needs of the others. Equals one device.

    Formula: y_r = f(x_r; z_i) for the rows x_r of rank r, where z_i are the keys and values, borders and sums for group
    normalization of all ranks at this step i.
    """

    method: Literal["patch"] = "patch"
