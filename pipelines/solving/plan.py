"""What calibration of a solver finds, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.caching.methods.joint import Joint
from fastdiff.caching.plan import quantization
from fastdiff.errors import BadConfig
from fastdiff.method import Settings
from fastdiff.plans import from_file
from fastdiff.run import Run

from .combine import counts

VERSION: Literal[1] = 1
SHIPPED = Path(__file__).parents[1] / "shapes" / "solvers"


class SolverPlan(Settings):
    """Where a run evaluates the model, and with which weights it goes on.

    `places` are noise levels on the scale of `Levels`, from the first evaluation's, 0, to the end, 1. `weights[n]` are
    what is added to the scheduler's own step n, of what `combine.parts` lists; none where that stands as it is. Where a
    stock solver was better, `use` names it, and there are neither.
    """

    version: Literal[1] = VERSION
    denoiser: str = Field(max_length=200, description="class and configuration of the model it was fitted on")
    quantization: str | None = Field(None, max_length=200, description="dtypes of quantized weights, if any")
    scheduler: str = Field(max_length=200, description="class of the pipeline's own scheduler")
    ode: str = Field("", max_length=200, description="prediction type and noise schedule; none: any")
    guidance_scale: float | None = Field(None, description="what the pipeline said of itself, if anything")
    shape: tuple[int, ...] = Field((), max_length=8, description="shape of the denoiser's input, without the batch")
    use: Literal["fitted", "own", "dpm++", "unipc"] = "fitted"
    evaluations: int = Field(ge=1, le=1_000)
    order: int = Field(4, ge=1, le=8, description="model outputs that a step is made of")
    places: tuple[float, ...] = Field((), max_length=1_001)
    weights: tuple[tuple[float, ...], ...] = Field((), max_length=1_000)
    leaves_out: Joint | None = Field(None, description="what evaluations leave out; none: they are whole")
    cost: float | None = Field(None, description="time of all evaluations, in whole ones, where it was measured")
    psnr: float | None = Field(None, description="its latents' PSNR to the teacher's on these, dB, peak 1")
    stock_psnr: float | None = Field(None, description="that of the best stock solver with as many evaluations")
    stock: str = Field("", max_length=200, description="which one that was")

    @model_validator(mode="after")
    def _whole(self) -> SolverPlan:
        if self.use != "fitted":
            return self
        if len(self.places) != self.evaluations + 1 or len(self.weights) != self.evaluations:
            raise ValueError(f"the plan needs weights for {self.evaluations} steps, and one noise level more")
        if (self.places[0], self.places[-1]) != (0, 1) or any(b <= a for a, b in pairwise(self.places)):
            raise ValueError("a solver's plan needs noise levels that rise from 0 to 1")
        for index, weights in enumerate(self.weights):
            if len(weights) not in (0, sum(counts(index, self.order))):
                raise ValueError(f"the plan has {len(weights)} weights at step {index}, which takes another number")
        if self.leaves_out is not None and len(self.leaves_out.kinds) != self.evaluations:
            raise ValueError(f"the plan says of {len(self.leaves_out.kinds)} evaluations what they leave out")
        return self

    def summary(self) -> str:
        """What was found, in a sentence."""
        levels = ", ".join(f"{place:.3f}" for place in self.places[:-1])
        what = f"at {levels}" if self.use == "fitted" else f"of the stock solver {self.use}, which nothing fitted beat"
        gain = "" if self.psnr is None else f"; {self.psnr:.1f} dB to the teacher on pictures left out of the fit"
        rival = "" if self.stock_psnr is None else f", {self.stock} {self.stock_psnr:.1f}"
        return f"{self.evaluations} evaluations{self._kinds()} {what}{gain}{rival}"

    def _kinds(self) -> str:
        if self.leaves_out is None:
            return ""
        kinds = self.leaves_out.kinds
        parts = [f"{kinds.count(kind)} {kind}" for kind in ("full", "conditional", "partial") if kind in kinds]
        return f" ({', '.join(parts)}; the time of {self.cost:.1f})" if self.cost else f" ({', '.join(parts)})"

    def left(self, strength: float) -> float:
        """The strength that leaves the evaluations at levels with at most so much noise, and at least the last one."""
        if not self.places:
            return max(strength, 1 / self.evaluations)
        count = sum(place >= 1 - strength - 1e-6 for place in self.places[:-1])
        return (max(count, 1) + 0.5) / self.evaluations

    def check_model(self, anatomy: Anatomy, ode: str) -> None:
        """Raises BadConfig if the plan was made for another model, or another noise schedule."""
        if self.ode and self.ode != ode:
            raise BadConfig(
                f"the solver's plan was made for {self.ode}, the pipeline's scheduler has {ode}; calibrate it with that"
            )
        found = fingerprint(anatomy)
        if self.denoiser != found:
            raise BadConfig(
                f"the solver's plan was made for {self.denoiser}, this model is {found}; calibrate it with this model"
            )

    def differences(self, run: Run, anatomy: Anatomy) -> list[str]:
        """What is different in a run from those that it was fitted on, a sentence each."""
        said = []
        if not run.late and run.total < self.evaluations:
            said.append(f"the run ends after {run.total} evaluations of the solver's plan, at the noise level there")
        if None not in (self.guidance_scale, run.guidance_scale) and self.guidance_scale != run.guidance_scale:
            said.append(
                f"the solver was fitted at guidance {self.guidance_scale:g}, this run has {run.guidance_scale:g}"
            )
        if self.shape and run.shape and self.shape != run.shape:
            said.append(
                f"the solver was fitted at {'x'.join(map(str, self.shape))}, this run is at "
                f"{'x'.join(map(str, run.shape))}"
            )
        if self.quantization != (found := quantization(anatomy)):
            said.append(
                f"the solver was fitted on {self.quantization or 'plain'} weights, these are {found or 'plain'}"
            )
        return said


def _known(values: Any, name: str) -> None:
    """Raises ValueError for what is no plan of a solver, or one of another version."""
    if not isinstance(values, Mapping) or not {"version", "places", "weights"} <= values.keys():
        raise ValueError(f"{name} holds no plan of a solver; make one with --set solver.evaluations=N")
    if values["version"] != VERSION:
        raise ValueError(f"{name} has version {values['version']!r}, this fastdiff reads {VERSION}; calibrate again")


FROM_FILE = from_file(SolverPlan, "plan file", "make one with fastdiff calibrate", _known)


def shipped(model: str | None) -> dict[int, Path]:
    """Files of the plans that come with an embedded model, by evaluations."""
    files = SHIPPED.glob(f"{model}-*.json") if model else ()
    return {int(path.stem.rpartition("-")[2]): path for path in sorted(files)}
