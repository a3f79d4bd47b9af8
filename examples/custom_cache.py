"""A cache method of your own: what a cached step leaves out, and which steps compute. Runs offline on a CPU."""

from typing import Literal

import fastdiff
from fastdiff.anatomy import Anatomy
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.region import Region
from fastdiff.caching.sites import model_output
from fastdiff.clock import Run


class GoldenSection(CacheMethod):
    """Compute the steps of the golden section: dense at the start, rare at the end."""

    method: Literal["golden_section"] = "golden_section"
    predictor: str = "adams_bashforth"

    def regions(self, anatomy: Anatomy) -> list[Region]:
        return [model_output(anatomy)]

    def mask(self, run: Run, region: Region) -> list[bool]:
        wanted = {round(run.total * 0.618**k) for k in range(run.total)}
        return [i in wanted or i < 3 for i in range(run.total)]


if __name__ == "__main__":
    fastdiff.register_cache(GoldenSection)
    pipe = fastdiff.load("shapes-unet")
    with fastdiff.accelerate(pipe, cache={"method": "golden_section", "cooldown_steps": 1}) as fast:
        image = pipe("a small green ring", num_inference_steps=20, guidance_scale=3).images[0]
        print(fast.report)
    image.save("golden.png")
