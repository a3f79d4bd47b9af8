"""What every cache method shares: its common settings, and the guards around its decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeInt, field_validator, model_validator
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run, Step
from fastdiff.errors import BadConfig, UnknownName, UnsupportedModel
from fastdiff.method import Method

from .predictors import FEWEST, PREDICTORS, Axis, combine, weights
from .protocols import Calibrator, Live, Passes
from .region import Memory, Region
from .verify import FIRST, USUAL

Forward = Callable[..., Any]
Weigh = Callable[[int, Sequence[int]], Sequence[float]]
Correct = Callable[[int, int, Tensor], Tensor]
Agree = Callable[[Tensor], Tensor]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[tuple[NonNegativeInt, ...], AfterValidator(lambda steps: tuple(sorted(set(steps))))]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"{list(ends)} is no range: give two shares from 0 to 1, the smaller one first")
    return ends


Span = Annotated[tuple[Share, Share], AfterValidator(_rising)]


class CacheMethod(Method):
    """A point in the grid of site (`regions`), policy (`mask` or `change`), predictor and guards.

    A method with a `mask` is static: what is computed is known before the run, the same on all ranks. A dynamic one
    (`Gated`) is asked at each step, with what its probe read now and before.
    """

    predictor: str = Field("reuse", description="how a skipped value is made: " + " or ".join(PREDICTORS))
    order: int = Field(2, ge=1, le=6, description="computed values a prediction may use")
    coordinate: Axis = Field("timestep", description="axis on which predictions extrapolate")
    damping: float = Field(1.0, ge=0, le=1, description="share of a forecast change that is taken; 0 reuses")
    lebesgue_max: float = Field(6.0, ge=1, description="drop the order while the weights amplify errors more than this")
    warmup_steps: int = Field(0, ge=0, description="computed steps at the start")
    cooldown_steps: int = Field(0, ge=0, description="computed steps at the end")
    max_consecutive_cached: int | None = Field(
        None, ge=1, description="compute at the latest after so many cached steps"
    )
    max_cached_steps: int | None = Field(None, ge=0, description="most cached steps in a run")
    guard: Literal["none", "verify", "speca"] = Field(
        "none",
        description="compare forecasts, verify: with computed steps, speca: with one block of skipped ones; compute "
        "where they fail",
    )
    verify_bound: float | None = Field(
        None, ge=0,
        description=f"relative error at which a forecast fails; empty: by the plan, {USUAL:g} without one "
        f"(speca: {FIRST:g})",
    )  # fmt: skip
    verify_decay: float = Field(0.3, gt=0, le=1, description="share of speca's bound that is left at the last step")

    language: ClassVar[bool] = False  # whether the method is for language models, not for images and video

    @property
    def history(self) -> int:
        """How many computed values a prediction may read: what is kept of each region."""
        return 1 if self.predictor == "reuse" else self.order

    @property
    def predicts_inside(self) -> bool:
        """Whether predictions are made while the denoiser runs, so that no graph of all of it can hold."""
        return self.guard == "speca"

    @field_validator("predictor")
    @classmethod
    def _known_predictor(cls, name: str) -> str:
        if name not in PREDICTORS:
            raise ValueError(str(UnknownName("predictor", name, PREDICTORS)))
        return name

    @model_validator(mode="after")
    def _makes_sense(self) -> Any:
        least = FEWEST.get(self.predictor, 1)
        if self.order < least:
            raise ValueError(
                f"order = {self.order}: {self.predictor} goes by {least} to 6 computed values; set order to one of them"
            )
        if self.guard != "none" and (why := self.unverifiable) is not None:
            raise ValueError(f'guard = "{self.guard}": {why}')
        return self

    @property
    def unverifiable(self) -> str | None:
        """Why no guard can check this method, and what can be done; None if it can."""
        return None

    def bounds(self, run: Run) -> Sequence[float]:
        """For each step of a run, the relative error at which the guard `verify` takes a forecast of it for failed."""
        return [USUAL if self.verify_bound is None else self.verify_bound] * run.total

    def regions(self, anatomy: Anatomy) -> list[Region]:
        """What a cached step leaves out. Raises UnsupportedModel, with the reason, where that is nothing."""
        raise NotImplementedError

    def places(self, anatomy: Anatomy) -> list[Region]:
        """`regions`, of a denoiser of the kind that the method is for. Raises UnsupportedModel for another kind."""
        if self.language != (anatomy.family.kind == "language"):
            what = "language models" if self.language else "image and video denoisers"
            raise UnsupportedModel(f"{self.method} is for {what}; {anatomy.family.name} is none")
        return self.regions(anatomy)

    def mask(self, run: Run, region: Region) -> list[bool] | None:
        """True for each step in which a region is computed; None if `change` decides."""
        return None

    def around(self, forward: Forward, session: Live) -> Forward:
        """The denoiser's forward, for methods that change what it is called with; runs inside the session's step."""
        return forward

    def weigher(self, run: Run) -> Weigh:
        """For a run: factors of the newest values, computed at given steps, that make the value of a step."""
        axis = run.coordinates(self.coordinate)

        def weigh(index: int, anchors: Sequence[int]) -> list[float]:
            known = [axis[a] for a in anchors]
            return weights(self.predictor, self.order, self.lebesgue_max, axis[index], known, self.damping)

        return weigh

    def forecast(self, factors: Sequence[float], memory: Memory, agree: Agree | None) -> list[Any]:
        """The leaves of a predicted value: the newest of a memory, by their factors. agree: makes numbers that a rank
        worked out the same on all."""
        columns = zip(*memory.values, strict=True)
        return [combine(factors, own) if isinstance(own[-1], Tensor) else own[-1] for own in columns]

    def corrector(self, run: Run, number: int) -> Correct | None:
        """For a run: what is made of a prediction (step, leaf number, value) of region `number`."""
        return None

    def of(self, component: str, main: bool) -> CacheMethod | None:
        """This method for one denoiser of a pipeline, the main one or another; None where it says nothing of it."""
        return self

    def calibrated(self, calibrator: Calibrator) -> Passes:
        """This method with what calibration finds for one denoiser in its settings.

        A generator that yields what is to be installed on the denoiser for a pass over all prompts, and returns the
        method; the denoisers of a pipeline share the passes. Raises BadConfig for a method that has nothing to
        calibrate, ValueError where calibration cannot succeed.
        """
        raise BadConfig(
            f"the cache method {self.method} has nothing to calibrate; set cache.method to one that takes a plan, "
            "dp for example"
        )

    def notes(self, run: Run, anatomy: Anatomy) -> list[str]:
        """What the report should say of a run that begins."""
        return []

    def guarded(self, wanted: bool, index: int, total: int, in_row: int = 0, cached: int = 0) -> bool:
        """The method's wish, overruled by warm-up, cool-down and the most cached steps, in a row and in all."""
        if index < max(1, self.warmup_steps) or index >= total - self.cooldown_steps:
            return True
        if self.max_cached_steps is not None and cached >= self.max_cached_steps:
            return True
        return wanted or (self.max_consecutive_cached is not None and in_row >= self.max_consecutive_cached)

    def guarded_mask(self, run: Run, region: Region) -> list[bool] | None:
        wished = self.mask(run, region)
        return None if wished is None else self.with_guards(wished)

    def with_guards(self, wished: Sequence[bool]) -> list[bool]:
        """A mask with the guards on it."""
        out: list[bool] = []
        for index, wanted in enumerate(wished):
            in_row = next((k for k, done in enumerate(reversed(out)) if done), len(out))
            out.append(self.guarded(wanted, index, len(wished), in_row, out.count(False)))
        return out


class Gated(CacheMethod):
    """A dynamic method: a step is computed where the `change` since the last computed one reaches the threshold.

    Only steps that no guard decides cost the host a look at the device; with `lagged` it looks at the number of the
    step before, which has arrived by then.
    """

    threshold: float = Field(0.1, ge=0, description="relative change from which on a step is computed")
    lagged: bool = Field(False, description="decide on the change up to the step before: no wait for the device")
    pictures: Literal["each", "strictest"] = Field("each", description="whose change decides for a picture of a batch")

    @property
    def unverifiable(self) -> str | None:
        return (
            f"{self.method} decides at each step, by its threshold; guards check what is planned before the run: "
            'take static, ab_cache or dp, or leave guard at "none"'
        )

    def change(self, step: Step, memory: Memory) -> Tensor:
        """How far this step is from the last computed one, a scalar on the device; memory: of one picture of the batch,
        both halves of guidance in it, where it is known which rows are whose."""
        raise NotImplementedError


def every(interval: int, run: Run, warmup_steps: int) -> list[bool]:
    """Compute the warm-up steps, and each `interval`-th step counted from the last of them."""
    start = max(0, warmup_steps - 1)
    return [i < start or (i - start) % interval == 0 for i in range(run.total)]


def spread(steps: Sequence[int], length: int, run: Run, name: str) -> list[bool]:
    """Compute the steps listed for a run of `length`, at the same shares of this run.

    Raises BadConfig for a step that such a run does not have.
    """
    if steps and max(steps) >= length:
        raise BadConfig(f"{name} holds {max(steps)}, but the run has steps 0 to {length - 1}")
    chosen = {round(step * (run.total - 1) / max(1, length - 1)) for step in steps}
    return [i in chosen for i in range(run.total)]


def placed(mask: list[bool] | None, own: Sequence[int], total: int) -> list[bool] | None:
    """A mask of this rank's own steps, as one of all; the others are computed, or not its business."""
    if mask is None:
        return None
    known = dict(zip(own, mask, strict=True))
    return [known.get(index, True) for index in range(total)]


def needed(mask: Sequence[bool], order: int) -> list[bool]:
    """For each step, whether a cached step may use its computed value: only the `order` newest ones are used."""
    use, computed = [False] * len(mask), []
    for index, compute in enumerate(mask):
        if compute:
            computed.append(index)
        else:
            for anchor in computed[-order:]:
                use[anchor] = True
    return use


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """Mean absolute change relative to the mean magnitude before; huge where that is zero."""
    tiny = torch.finfo(torch.float32).tiny
    return (now - before).abs().mean().float() / before.abs().mean().float().clamp_min(tiny)
