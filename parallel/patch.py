"""Synchronous patch parallelism: DistriFusion's split without its staleness. Paper: https://arxiv.org/abs/2402.19481."""

from __future__ import annotations

from typing import Literal

from .base import ParallelMethod


class Patch(ParallelMethod):
    """Each rank computes its rows; every layer waits for what it needs of the others. Equals one device."""

    method: Literal["patch"] = "patch"
