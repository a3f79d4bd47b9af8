"""Ours: what each evaluation of a planned trajectory leaves out. Related: LinearAG (Adaptive Guidance), https://arxiv.org/abs/2312.12487."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod, Forward, Weigh
from fastdiff.caching.guidance import GuidanceGate
from fastdiff.caching.predictors import Axis
from fastdiff.caching.protocols import Live
from fastdiff.caching.region import Region
from fastdiff.caching.sites import Site, at
from fastdiff.clock import Run

Kind: TypeAlias = Literal["full", "conditional", "partial"]


class Joint(CacheMethod):
    """Each step of a run is computed as its kind says: whole, for the conditional half of guidance alone, or with a
    site inside the denoiser predicted. `calibrate` chooses kinds along with a fitted solver's levels and weights.

    A run with another number of steps, or one that begins inside the list, computes every step, and says so.

    Formula: conditional: u_i = c_i + w_1 d_j + w_2 d_k + v (c_i - c_j) with d = u - c, j and k the last full steps;
    partial: the site's output by the predictor from the full steps before i.
    """

    method: Literal["joint"] = "joint"
    predictor: str = "adams_bashforth"
    coordinate: Axis = Field("logsnr", description="axis on which predictions extrapolate")
    kinds: tuple[Kind, ...] = Field(min_length=1, max_length=1_000, description="what each step computes")
    site: Site = Field("auto", description="what a partial step predicts")
    branch: int = Field(0, ge=0, description="skip connection to split at (site inner)")
    live_blocks: int = Field(1, ge=0, description="blocks that always run (site stack)")
    guesses: dict[int, tuple[float, ...]] = Field(
        default_factory=dict, description="w_1, w_2 and v of conditional steps; else the predictor's weights and 0"
    )

    def regions(self, anatomy: Anatomy) -> list[Region]:
        partial = "partial" in self.kinds
        return [at(self.site, anatomy, live=self.live_blocks, branch=self.branch)] if partial else []

    def fits(self, run: Run) -> bool:
        return not run.late and run.total == len(self.kinds)

    def mask(self, run: Run, region: Region) -> list[bool]:
        return [kind != "partial" for kind in self.kinds] if self.fits(run) else [True] * run.total

    def halved(self, run: Run, index: int) -> bool:
        """Whether a step is asked for the conditional output alone."""
        return self.fits(run) and not self.with_guards([kind != "conditional" for kind in self.kinds])[index]

    def weigher(self, run: Run) -> Weigh:
        usual = super().weigher(run)

        def weigh(index: int, anchors: Sequence[int]) -> Sequence[float]:
            guess = self.guesses.get(index, ())
            return guess[-2::-1] if len(guess) == len(anchors) + 1 and self.fits(run) else usual(index, anchors)

        return weigh

    def around(self, forward: Forward, session: Live) -> Forward:
        if "conditional" not in self.kinds:
            return forward
        news = {index: guess[-1] for index, guess in self.guesses.items()}
        return GuidanceGate(self.halved, self.order, session, forward, True, news)

    def notes(self, run: Run, anatomy: Anatomy) -> list[str]:
        if self.fits(run):
            return []
        return [f"the run is none of {len(self.kinds)} steps from pure noise: every step is computed whole"]
