"""Plan files: what calibration found, what it was made on, and what becomes of it in another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, NonNegativeFloat, field_validator, model_validator

from fastdiff import plans
from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.clock import Run
from fastdiff.errors import BadConfig
from fastdiff.method import Settings

Floats = NDArray[np.float64]
LARGEST = 64 << 20  # bytes of a plan file

PLAN = "what calibrate found, or the path of its file; of several denoisers one each, by component"
VERSION: Literal[2] = 2


class Plan(Settings):
    """What calibration found, with what it was made on; methods add what they need.

    `shape` is that of one latent, the class of resolution; `quantization` names weights that are no plain floats;
    `called` are the steps in which the denoiser was called, where it shares the run with another one.
    """

    version: Literal[2] = VERSION
    denoiser: str = Field(max_length=200, description="class and configuration of the model that was traced")
    quantization: str | None = Field(None, max_length=200, description="dtypes of quantized weights, if any")
    scheduler: str = Field(max_length=200, description="class of the solver")
    guidance_scale: float | None = Field(None, description="what the pipeline said of itself, if anything")
    shape: tuple[int, ...] = Field((), max_length=8, description="shape of the denoiser's input, without the batch")
    sigmas: tuple[NonNegativeFloat, ...] = Field(
        min_length=1, max_length=10_000, description="noise level of each step"
    )
    called: tuple[int, ...] = Field((), max_length=10_000, description="steps of this denoiser; none: all of them")

    def summary(self) -> str:
        """What was found, in a sentence."""
        return f"made on runs of {len(self.sigmas)} steps"

    def check_model(self, anatomy: Anatomy) -> None:
        """Raises BadConfig if the plan was made for another model."""
        found = fingerprint(anatomy)
        if self.denoiser != found:
            raise BadConfig(
                f"the plan was made for {self.denoiser}, this model is {found}; calibrate it with this model"
            )

    def differences(self, run: Run, anatomy: Anatomy | None = None) -> list[str]:
        """What is different in a run from the one that was traced, a sentence each."""
        said = []
        if run.scheduler and run.scheduler != self.scheduler:
            said.append(f"the plan was made with {self.scheduler}, this run has {run.scheduler}")
        if None not in (self.guidance_scale, run.guidance_scale) and self.guidance_scale != run.guidance_scale:
            said.append(f"the plan was made with guidance {self.guidance_scale:g}, this run has {run.guidance_scale:g}")
        if self.shape and run.shape and self.shape != run.shape:
            said.append(f"the plan was made at {_size(self.shape)}, this run is at {_size(run.shape)}")
        if anatomy is not None and self.quantization != (found := quantization(anatomy)):
            said.append(f"the plan was made with {self.quantization or 'plain'} weights, these are {found or 'plain'}")
        if not self.fits(run):
            said.append(f"the plan of {len(self.sigmas)} steps was re-mapped to the noise levels of these {run.total}")
        return said

    def fits(self, run: Run) -> bool:
        """Does the run visit the noise levels of the plan?"""
        return len(self.sigmas) == run.total and all(
            abs(a - b) <= 1e-4 * max(1.0, abs(a)) for a, b in zip(self.sigmas, run.sigmas, strict=True)
        )

    def places(self, run: Run) -> Floats:
        """Where each step of a run would be in the plan, as a fraction of its steps; below 0 where it is noisier."""
        # log(1 + sigma) is even enough both for noise over signal and for flow matching; 0 is where a run ends
        grid, wanted = -np.log1p([*self.sigmas, 0.0]), -np.log1p(run.sigmas)
        total, lead = len(self.sigmas), 0.0
        if wanted[0] < grid[0] < grid[1]:  # noisier, as a run of more steps is with leading timesteps
            lead = min(1.0, float((grid[0] - wanted[0]) / (grid[1] - grid[0])))
            grid = np.concatenate([wanted[:1], grid])
        return np.maximum.accumulate(np.interp(wanted, grid, [-lead, *range(total + 1)] if lead else range(total + 1)))

    def calls(self, run: Run) -> list[bool]:
        """For each step of a run, whether the denoiser was called at about the same noise level."""
        known, last = set(self.called or range(len(self.sigmas))), len(self.sigmas) - 1
        return [min(max(round(place), 0), last) in known for place in self.places(run).tolist()]


class Schedule(Plan):
    """A plan of which steps to compute; among them are those of other denoisers, if any.

    `weights[step]` are the (computed step, factor) pairs that make the value of a skipped step.
    """

    compute: tuple[int, ...] = Field(min_length=1, max_length=10_000, description="steps to compute")
    weights: Mapping[int, tuple[tuple[int, float], ...]] = Field(default_factory=dict)
    error: float | None = Field(None, ge=0, description="predicted relative error of what was traced")
    forecasts: Mapping[int, NonNegativeFloat] = Field(
        default_factory=dict, description="largest relative error traced of what would be forecast of computed steps"
    )

    @field_validator("compute")
    @classmethod
    def _in_order(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)) or steps[0] != 0:
            raise ValueError("a plan's computed steps must start with 0 and rise")
        return steps

    @model_validator(mode="after")
    def _within_the_run(self) -> Schedule:
        total, computed = len(self.sigmas), set(self.compute)
        if self.compute[-1] >= total:
            raise ValueError(f"the plan computes step {self.compute[-1]} of a run of {total}")
        for step, pairs in self.weights.items():
            if not 0 <= step < total or step in computed:
                raise ValueError(f"the plan has weights for step {step}, which is not one of the steps it skips")
            if wrong := [anchor for anchor, _ in pairs if anchor not in computed or anchor > step]:
                raise ValueError(f"the plan makes step {step} of step {wrong[0]}, which is not computed before it")
        return self

    def summary(self) -> str:
        own = self.called or range(len(self.sigmas))
        chosen = [step for step in self.compute if step in own]
        error = "" if self.error is None else f"; predicted error {self.error:.2%} of what was traced"
        return f"computes {len(chosen)} of {len(own)} steps: {', '.join(map(str, chosen))}{error}"

    def steps(self, run: Run) -> tuple[int, ...]:
        """Steps of any run to compute: the plan's own, or as large a share, spread over noise levels as in the plan."""
        if self.fits(run):
            return self.compute
        at = self.places(run)
        total, computed, lead = len(self.sigmas), len(self.compute), max(0.0, -float(at[0]))
        marks = [-lead - 1e-9, *self.compute, total]
        ranks = [-lead * computed / total, *range(computed + 1)]
        first = float(np.interp(at[0], marks, ranks))
        count = max(1, round(computed * run.total / total))
        chosen: list[int] = []
        for k in range(count):
            place = np.interp(first + k * (computed - first) / count, ranks, marks)
            least, most = (chosen[-1] + 1 if chosen else 0), run.total - (count - k)
            chosen.append(min(max(int(np.abs(at - place).argmin()), least), most) if k else 0)
        return tuple(chosen)


def _known(values: Any, name: str) -> None:
    """Raises ValueError for what is no plan, or one of another version."""
    if not isinstance(values, Mapping) or not {"version", "denoiser", "sigmas"} <= values.keys():
        raise ValueError(f"{name} holds no plan; make one with fastdiff calibrate")
    if values["version"] != VERSION:
        raise ValueError(f"{name} has version {values['version']!r}, this fastdiff reads {VERSION}; calibrate again")


def from_file(kind: type[Plan]) -> BeforeValidator:
    """Lets a setting name a plan file where it wants a plan, or one for each denoiser."""
    return plans.from_file(kind, "plan file", "make one with fastdiff calibrate", _known, LARGEST)


def quantization(anatomy: Anatomy) -> str | None:
    """What layers say of how they were quantized, or dtypes of weights that are no plain floats; None where all are."""
    told = {str(m.quantized_as) for m in anatomy.denoiser.modules() if hasattr(m, "quantized_as")}
    if told:
        return "+".join(sorted(told))
    plain = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    tensors = [*anatomy.denoiser.parameters(), *anatomy.denoiser.buffers()]
    found = {str(t.dtype).removeprefix("torch.") for t in tensors if t.ndim >= 2 and t.dtype not in plain}
    return "+".join(sorted(found)) or None


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
