"""A cache method that another package brings. Its link would be here: https://example.org/golden-section."""

from typing import Literal

from pydantic import Field

from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.region import Region
from fastdiff.caching.sites import model_output
from fastdiff.clock import Run


class Golden(CacheMethod):
    """Compute the steps of the golden section: dense at the start, rare at the end."""

    method: Literal["golden"] = "golden"
    predictor: str = "adams_bashforth"
    ratio: float = Field(0.618, gt=0, lt=1, description="each computed step lies at this part of the way to the last")

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [model_output(anatomy)]

    def mask(self, run: Run, region: Region) -> list[bool]:
        wanted = {round(run.total * self.ratio**k) for k in range(run.total)}
        return [i in wanted or i < 3 for i in range(run.total)]
