"""Plan files: what calibration found, what it was made on, and what becomes of it in another run."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, ValidationError, field_validator, model_validator

from fastdiff.anatomy import Anatomy
from fastdiff.clock import Run
from fastdiff.method import Settings

VERSION: Literal[1] = 1


class Plan(Settings):
    """The steps to compute in a run like the one that was traced, and what is made of the others.

    `weights[step]` are the (computed step, factor) pairs that make the output of a skipped step.
    """

    version: Literal[1] = VERSION
    denoiser: str = Field(max_length=200, description="class and configuration of the model that was traced")
    scheduler: str = Field(max_length=200, description="class of the solver")
    guidance_scale: float | None = Field(None, description="what the pipeline said of itself, if anything")
    sigmas: tuple[NonNegativeFloat, ...] = Field(
        min_length=1, max_length=10_000, description="noise level of each step"
    )
    compute: tuple[int, ...] = Field(min_length=1, max_length=10_000, description="steps to compute")
    weights: Mapping[int, tuple[tuple[int, float], ...]] = Field(default_factory=dict)
    error: float | None = Field(None, ge=0, description="predicted error of the final latents, relative")

    @field_validator("compute")
    @classmethod
    def _in_order(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)) or steps[0] != 0:
            raise ValueError("a plan's computed steps must start with 0 and rise")
        return steps

    @model_validator(mode="after")
    def _within_the_run(self) -> Plan:
        total, computed = len(self.sigmas), set(self.compute)
        if self.compute[-1] >= total:
            raise ValueError(f"the plan computes step {self.compute[-1]} of a run of {total}")
        for step, pairs in self.weights.items():
            if not 0 <= step < total or step in computed:
                raise ValueError(f"the plan has weights for step {step}, which is not one of the steps it skips")
            if wrong := [anchor for anchor, _ in pairs if anchor not in computed or anchor > step]:
                raise ValueError(f"the plan makes step {step} of step {wrong[0]}, which is not computed before it")
        return self

    def fits(self, run: Run) -> bool:
        """Does the run visit the noise levels of the plan?"""
        return len(self.sigmas) == run.total and all(
            abs(a - b) <= 1e-4 * max(1.0, abs(a)) for a, b in zip(self.sigmas, run.sigmas, strict=True)
        )

    def steps(self, run: Run) -> tuple[int, ...]:
        """Steps of any run to compute: the plan's own, or as large a share, spread over noise levels as in the plan."""
        if self.fits(run):
            return self.compute
        # log(1 + sigma) is even enough both for noise over signal and for flow matching; 0 is where a run ends
        grid, wanted = -np.log1p([*self.sigmas, 0.0]), -np.log1p(run.sigmas)
        total, computed = len(self.sigmas), len(self.compute)
        lead = 0.0  # a run may begin noisier, as one of more steps does with leading timesteps
        if wanted[0] < grid[0] < grid[1]:
            lead = min(1.0, float((grid[0] - wanted[0]) / (grid[1] - grid[0])))
            grid = np.concatenate([wanted[:1], grid])
        at = np.interp(wanted, grid, [-lead, *range(total + 1)] if lead else range(total + 1))
        at = np.maximum.accumulate(at)  # where each step would be in the plan
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


def read_plan(path: Path) -> dict[str, Any]:
    """What a plan file holds. Raises ValueError, in one sentence, for a file that is missing, broken or no plan."""
    name = f"plan file {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{name} does not exist; make one with fastdiff calibrate")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is truncated or no JSON: {error}") from None
    if not isinstance(values, dict) or not {"version", "compute", "sigmas"} <= values.keys():
        raise ValueError(f"{name} holds no plan; make one with fastdiff calibrate")
    if values["version"] != VERSION:
        raise ValueError(f"{name} has version {values['version']!r}, this fastdiff reads {VERSION}; calibrate again")
    try:
        Plan.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        why = str(first["ctx"]["error"]) if first["type"] == "value_error" else f"{where}: {first['msg'].lower()}"
        raise ValueError(f"{name} is damaged: {why}") from None
    return values


def fingerprint(anatomy: Anatomy) -> str:
    """Class and configuration of a denoiser: what tells a plan's model from another.

    Adapters, quantization, fine-tuning and a newer diffusers, which adds settings with defaults, do not change it.
    """
    kind = type(anatomy.denoiser)
    usual = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    given = dict(getattr(anatomy.denoiser, "config", None) or {})
    kept = {k: v for k, v in given.items() if not k.startswith("_") and _plain(v) != _plain(usual.get(k, ...))}
    digest = hashlib.sha256(_plain(dict(sorted(kept.items()))).encode()).hexdigest()[:12]
    return f"{kind.__name__} {digest}"


def _plain(value: Any) -> str:
    """Text in which lists and tuples, which saving turns into each other, are the same."""
    return json.dumps(value, sort_keys=True, default=str)
