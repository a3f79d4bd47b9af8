"""Methods that go by what calibration found: which plan is whose, and what a plan of steps settles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run
from fastdiff.errors import BadConfig
from fastdiff.plans import Each, own

from .base import CacheMethod
from .plan import Plan, Schedule
from .protocols import Calibrator
from .region import Region
from .schedule import Costs
from .sites import Site, at
from .trace import SiteTrace
from .verify import bounds_of, forecast_errors

S = TypeVar("S", bound=Schedule)


class Planned(CacheMethod):
    """A method with a `plan`: one, or one for each denoiser of the pipeline."""

    plan: Any = None

    def of(self, component: str, main: bool) -> CacheMethod | None:
        if self.plan is None:
            return self
        plan = own(self.plan, component, main)
        return None if plan is None else self.model_copy(update={"plan": plan})

    @property
    def found(self) -> Any:
        """The plan of one denoiser. Raises BadConfig where there is none."""
        if not isinstance(self.plan, Plan):
            raise BadConfig(
                f"the cache method {self.method} needs a plan: make one with fastdiff calibrate, and name it as `plan`"
            )
        return self.plan

    def notes(self, run: Run, anatomy: Anatomy) -> list[str]:
        return [] if self.plan is None else self.found.differences(run, anatomy)

    def with_plan(self, plan: Plan | Each) -> Any:
        return self.model_copy(update={"plan": plan})


class Scheduled(Planned):
    """A method whose computed steps are those of a plan."""

    site: Site = Field("auto", description="what a cached step leaves out")
    branch: int = Field(0, ge=0, description="skip connection to split at (a UNet's inside)")
    live_blocks: int = Field(0, ge=0, description="blocks that always run (a transformer's stack)")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        self.found.check_model(anatomy)
        return [self.region(anatomy)]

    def region(self, anatomy: Anatomy) -> Region:
        return at(self.site, anatomy, live=self.live_blocks, branch=self.branch)

    def mask(self, run: Run, region: Region) -> list[bool]:
        steps = set(self.found.steps(run))
        return [i in steps for i in range(run.total)]

    def bounds(self, run: Run) -> Sequence[float]:
        seen = self.found.forecasts
        if self.verify_bound is not None or not seen or not self.found.fits(run):
            return super().bounds(run)
        return bounds_of(seen, run.total)

    def forced(self, run: Run, steps: Sequence[int]) -> list[int]:
        """Places, among some steps of a run, of those that guards compute; the first is always one."""
        return sorted({0, *(k for k, step in enumerate(steps) if self.guarded(False, step, run.total))})

    def schedule(
        self, kind: type[S], calibrator: Calibrator, steps: Sequence[int], costs: Costs, chosen: Sequence[int],
        seen: SiteTrace, **more: Any,
    ) -> S:  # fmt: skip
        """A plan in which, of a denoiser's `steps` in the run, those at the places `chosen` are computed; those of
        other denoisers are not its business. seen: what the site gave, for the guard `verify`."""
        run = calibrator.run
        computed = {steps[k] for k in chosen} | (set(range(run.total)) - set(steps))
        if seen.runs is not None and seen.steps == tuple(steps):
            found = forecast_errors(seen.runs, costs.predict, chosen)
            more["forecasts"] = {steps[k]: error for k, error in found.items()}
        return kind(**calibrator.origin(run), compute=tuple(sorted(computed)), error=costs.error(chosen), **more)
