"""When and where a displaced method waits after all: freshness as a schedule over steps and layers.

Warm-up and strided synchronous steps are DistriFusion's and PCPP's; cool-down and layers that stay synchronous are
those of DICE (https://arxiv.org/abs/2411.16786), which hides the exchange of experts in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.errors import BadConfig
from fastdiff.plans import from_file

from .base import ParallelMethod
from .waiting import LayerPlan

_HINT = "fastdiff calibrate --set parallel.sync_kb=KB makes one"


class Displaced(ParallelMethod):
    """After the warm-up layers use the other ranks' values of the step before, but where this schedule says not."""

    cooldown_steps: int = Field(0, ge=0, description="steps at the end in which every rank waits for fresh values")
    refresh: int | None = Field(None, ge=1, description="see everything, fresh, every so many steps after the warm-up")
    sync_layers: tuple[str, ...] = Field(
        (), description="layers that wait in every step: names of modules, of what holds them, or patterns with *"
    )
    sync_kb: float | None = Field(
        None, gt=0, description="for calibrate: kB that a rank's waiting layers may send, a picture and step"
    )
    plan: Annotated[LayerPlan | None, from_file(LayerPlan, "layer plan", _HINT, largest=16 << 20)] = Field(
        None, description="the layers that calibrate chose to wait, or the path of its file"
    )

    def fresh(self, index: int, total: int | None = None) -> bool:
        return self.whole(index, total)

    def whole(self, index: int, total: int | None = None) -> bool:
        late = index - self.warmup_steps
        if late <= 0 or (total is not None and index >= total - self.cooldown_steps):
            return True
        return self.refresh is not None and late % self.refresh == 0

    def last(self, total: int) -> int:
        return max(0, total - 1 - self.cooldown_steps)

    def waits(self, layer: str) -> bool:
        return any(_is(layer, name) for name in self._waiting)

    def check_layers(self, anatomy: Anatomy, layers: Sequence[str]) -> None:
        if self.plan is not None and self.plan.denoiser != (found := fingerprint(anatomy)):
            raise BadConfig(
                f"the layer plan was made for {self.plan.denoiser}, this model is {found}; calibrate it with this model"
            )
        for name in self._waiting:
            if not any(_is(layer, name) for layer in layers):
                near = " and ".join(get_close_matches(name, layers, 2, 0))
                raise BadConfig(
                    f"parallel.sync_layers names {name!r}, but none of the {len(layers)} layers of "
                    f"{type(anatomy.denoiser).__name__} that ask other ranks matches it; nearest are {near}"
                )

    @property
    def _waiting(self) -> tuple[str, ...]:
        return self.sync_layers + (self.plan.layers if self.plan is not None else ())


def _is(layer: str, name: str) -> bool:
    """Whether a name or pattern is that of a layer or of what holds it."""
    return fnmatchcase(layer, name) or fnmatchcase(layer, f"{name}.*")
