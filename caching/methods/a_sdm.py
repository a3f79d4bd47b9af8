"""A-SDM: Accelerating Stable Diffusion through Model Assembly and Feature Inheritance. Paper: https://arxiv.org/abs/2406.00210.

Only the abstract and its claims were at hand: sites and modes are built from them, not from the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import Share, Span, every, spread
from fastdiff.caching.plan import PLAN, Plan, from_file
from fastdiff.caching.planned import Planned
from fastdiff.caching.protocols import Calibrator, Passes
from fastdiff.caching.region import Region
from fastdiff.caching.sites import each_block, sublayers
from fastdiff.caching.unet import Level, unet_parts
from fastdiff.clock import Run
from fastdiff.errors import BadConfig, UnsupportedModel
from fastdiff.plans import Each


class Ranked(Plan):
    """Sites by the share of the denoiser's time that they took, the longest first."""

    sites: tuple[tuple[Annotated[str, Field(max_length=300)], Share], ...] = Field(min_length=1, max_length=100_000)

    def summary(self) -> str:
        longest = ", ".join(f"{site} {part:.1%}" for site, part in self.sites[:4])
        return f"{len(self.sites)} sites by time: {longest}, ..."

    def first(self, share: float) -> list[str]:
        """The fewest sites that make up a share of the time, none of them inside another."""
        chosen: list[str] = []
        covered = 0.0
        for site, part in self.sites:
            if covered >= share:
                break
            if not any(f"{site}.".startswith(f"{other}.") or f"{other}.".startswith(f"{site}.") for other in chosen):
                chosen.append(site)
                covered += part
        return chosen


class ASDM(Planned):
    """Inherit the features of chosen blocks, layers or units from an earlier step; everything else is computed.

    `sites` are paths with wildcards; calibrate ranks all sites by the time they take, and those that make up
    `time_share` of it are taken where `sites` is empty.

    Formula: v_i = v_j at the chosen sites, with j the last step in which the site was computed; all around it is
    computed at every step.
    """

    method: Literal["a_sdm"] = "a_sdm"
    level: Level = Field("block", description="what is inherited: blocks, layers (ResNet and attention) or units")
    sites: tuple[str, ...] = Field((), description="paths of what is inherited; empty: the inner half, and attn2")
    sampling: Literal["interval", "dense_ends", "window", "explicit"] = Field(
        "interval", description="which steps inherit"
    )
    interval: int = Field(2, ge=1, description="compute every so many steps")
    intervals: Mapping[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other intervals for some sites, by path with wildcards"
    )
    window: Span = Field((0.3, 0.8), description="shares of the run between which steps inherit")
    compute_steps: tuple[int, ...] = Field((), description="steps to compute (sampling explicit)")
    of_steps: int | None = Field(None, ge=1, description="run length that compute_steps is for")
    time_share: Share = Field(0.4, description="share of the denoiser's time that the sites of a plan make up")
    plan: Annotated[Ranked | Each[Ranked] | None, from_file(Ranked)] = Field(None, description=PLAN)

    def candidates(self, anatomy: Anatomy) -> list[Region]:
        """Everything of the chosen level."""
        if anatomy.family.kind == "unet":
            return unet_parts(anatomy, self.level)
        if self.level == "layer":
            raise UnsupportedModel(f"{anatomy.family.name} has no layers as A-SDM has them; set level = block or unit")
        return sublayers(anatomy) if self.level == "unit" else each_block(anatomy)

    def regions(self, anatomy: Anatomy) -> list[Region]:
        found = self.candidates(anatomy)
        sites: Sequence[str] = self.sites
        if self.plan is not None:
            self.found.check_model(anatomy)
            sites = sites or self.found.first(self.time_share)
        chosen = [region for region in found if any(fnmatchcase(region.name, site) for site in sites)]
        if self.sites and not chosen:
            names = ", ".join(region.name for region in found[:6])
            raise BadConfig(f"sites = {list(self.sites)} matches no {self.level} of this model; they are {names}, ...")
        return chosen or self._inner(found)

    def _inner(self, found: list[Region]) -> list[Region]:
        """The middle half of what runs, which in a UNet is its deepest part, and the cross-attention of units."""
        quarter = len(found) // 4
        cross = [region for region in found if region.name.endswith("attn2")]
        return cross or found[quarter : len(found) - quarter]

    def mask(self, run: Run, region: Region) -> list[bool]:
        if self.sampling == "explicit":
            return spread(self.compute_steps or (0,), self.of_steps or run.total, run, "compute_steps")
        interval = next((n for site, n in self.intervals.items() if fnmatchcase(region.name, site)), self.interval)
        start, stop = (round(share * run.total) for share in self.window)
        if self.sampling == "window":
            return [not start <= i < stop for i in range(run.total)]
        regular = every(interval, run, self.warmup_steps)
        if self.sampling == "dense_ends":
            return [wanted or not start <= i < stop for i, wanted in enumerate(regular)]
        return regular

    def calibrated(self, calibrator: Calibrator) -> Passes:
        """Ranks all sites of the level by the time they take in an uncached run."""
        from fastdiff.caching.calibration import Stopwatch

        stopwatch = Stopwatch()
        denoiser = Region("", (calibrator.anatomy.denoiser,))
        with stopwatch.on([denoiser, *self.candidates(calibrator.anatomy)]):
            yield lambda *live: None
        run, whole = calibrator.run, stopwatch.seconds.pop("", 0.0)
        shares = {name: min(1.0, seconds / whole) for name, seconds in stopwatch.seconds.items()}
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        return self.with_plan(Ranked(**calibrator.origin(run), sites=tuple(ranked)))
