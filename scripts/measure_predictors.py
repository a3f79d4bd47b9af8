"""Writes benchmarks/predictors.json: what predictors, dp's objectives and weights by group are worth, the guards
`verify` and `speca`, and the slope of DiCache, on the embedded models.

Run it from the root: python scripts/measure_predictors.py [PART or MODEL...]. Plans and weights are made on captions of
the training's kind; all numbers are of captions held out from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff import output
from fastdiff.bench import metrics
from fastdiff.bench.scenes import scenes
from fastdiff.caching.predictors import weights
from fastdiff.caching.schedule import Costs, spans
from fastdiff.caching.trace import influence
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.loading import CALL_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
KNOWN, DRAWN, BATCH = 16, 8, 8  # captions of a trace, pictures of a row, at a time
GROUPINGS = ("one", "channels", "2 bands", "4 bands")
ROWS: dict[str, dict[str, Any]] = {
    "reuse": {"predictor": "reuse"},
    "line": {"order": 2},
    "line, damping 0.5": {"order": 2, "damping": 0.5},
    "parabola": {"order": 3},
    "spectrum 4": {"predictor": "spectrum", "order": 4},
    "spectrum 6": {"predictor": "spectrum", "order": 6},
}
PLANS: dict[str, dict[str, Any]] = {
    "line": {},
    "line, fitted damping": {"fit_damping": True},
    "line, ridge": {"ridge": 0.01},
    "line, minimax": {"objective": "minimax"},
}
# LeMiCa's plan takes a run for each group, so it is of a short run of the transformer, and traced on one caption, which
# its authors find enough; the sum on one is beside it.
OBJECTIVES: dict[str, tuple[int, dict[str, Any]]] = {
    "sum": (8, {}),
    "sum, 1 caption": (1, {}),
    "minimax": (8, {"objective": "minimax"}),
    "meancache": (8, {"objective": "meancache"}),
    "lemica, 1 caption": (1, {"objective": "lemica"}),
}
SHORT = {"num_inference_steps": 14}
MADE: dict[str, dict[str, Any]] = {"line": {"predictor": "adams_bashforth"}, "reuse": {"predictor": "reuse"}}
PROBED: dict[str, dict[str, Any]] = {
    f"{method} {threshold}, {name}": {"method": method, "threshold": threshold, **more}
    for method, thresholds, made in (
        ("dicache", (0.2, 0.4, 0.8), {"slope": {}} | {name: {"slope": False, **own} for name, own in MADE.items()}),
        ("first_block", (0.16, 0.3), MADE),
    )
    for threshold in thresholds
    for name, more in made.items()
}


class Study:
    """An embedded model, its captions, and the plain latents of the held-out ones."""

    def __init__(self, model: str) -> None:
        self.pipe: Any = fastdiff.load(model, device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.call = dict(CALL_DEFAULTS[model])
        self.known, self.held = ([s.caption for s in scenes(0, KNOWN, held_out=held)] for held in (False, True))
        self.truth = self.drawn(None)[0]

    def drawn(self, cache: Any, captions: Sequence[str] | None = None, heard: Any = None) -> tuple[np.ndarray, list]:
        """Pictures of some captions, of held-out ones if None, and the report of each call. heard: called with the
        clock before anything is drawn."""
        found, reports = [], []
        with fastdiff.accelerate(self.pipe, cache=cache) as fast:
            if heard is not None:
                heard(fast.clock)
            some = self.held[:DRAWN] if captions is None else captions
            for start in range(0, len(some), BATCH):
                seeds = range(1000 + start, 1000 + start + BATCH)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                call = self.call | {"generator": generators, "output_type": "np"}
                found.append(self.pipe(list(some[start : start + BATCH]), **call).images)
                reports.append(fast.report)
        return np.concatenate(found), reports

    def row(self, name: str, cache: Any) -> dict[str, Any]:
        images, reports = self.drawn(cache)
        psnr = metrics.psnr(images, self.truth)
        told = {"mean": round(float(psnr.mean()), 2), "worst": round(float(psnr.min()), 2)}
        each = [count for report in reports for counts in report.pictures.values() for count in counts]
        by_picture = {"computed_by_picture": round(float(np.mean(each)), 2)} if each else {}
        print(name, reports[0].computed, told, reports[0].verified, file=sys.stderr)
        return {"name": name, "computed": reports[0].computed, "of": reports[0].steps, "psnr": told, **by_picture} | (
            {"verified": {key: sum(r.verified[key] for r in reports) for key in reports[0].verified}}
            if reports[0].verified
            else {}
        )

    def planned(self, computed: int, settings: dict[str, Any], captions: int = DRAWN) -> Any:
        config = fastdiff.Config(cache={"method": "dp", "computed_steps": computed, **settings})
        return calibrate(self.pipe, config, self.known[:captions], batch=BATCH, **self.call).cache

    @property
    def probes(self) -> bool:
        """Whether the model is one of blocks."""
        return hasattr(self.pipe, "transformer")


def intervals(study: Study) -> Iterator[dict[str, Any]]:
    for interval in (3, 5):
        for name, settings in ROWS.items():
            cache = {"method": "ab_cache", "interval": interval, "coordinate": "logsnr", **settings}
            yield study.row(f"every {interval}: {name}", cache)


def plans(study: Study) -> Iterator[dict[str, Any]]:
    for name, settings in PLANS.items():
        yield study.row(f"dp: {name}", study.planned(round(study.call["num_inference_steps"] * 0.24), settings))


def guarded(study: Study) -> Iterator[dict[str, Any]]:
    """How often the guard finds a plan's forecasts failed where nothing is unusual, and where the guidance is."""
    plan = study.planned(round(study.call["num_inference_steps"] * 0.4), {})
    verify = plan.model_copy(update={"guard": "verify"})
    yield study.row("dp, verify", verify)
    usual = {"method": "ab_cache", "interval": 3, "coordinate": "logsnr", "guard": "verify"}
    yield study.row("ab_cache 3, verify", usual)
    yield study.row("fora 3, verify", {"method": "fora", "interval": 3, "guard": "verify"})
    default = study.call["guidance_scale"]
    study.call["guidance_scale"] = 7.5
    kept, study.truth = study.truth, study.drawn(None)[0]
    yield study.row("guidance 7.5: dp", plan)
    yield study.row("guidance 7.5: dp, verify", verify)
    study.truth, study.call["guidance_scale"] = kept, default


def objectives(study: Study) -> Iterator[dict[str, Any]]:
    """Plans of as many steps by another objective each; LeMiCa's on the transformer alone."""
    computed, longest = (5, 4) if study.probes else (12, 5)
    call, kept = study.call, study.truth
    if study.probes:
        study.call = {**call, **SHORT}
        study.truth = study.drawn(None)[0]
    for name, (captions, settings) in OBJECTIVES.items():
        if study.probes or settings.get("objective") != "lemica":
            plan = study.planned(computed, {"longest": longest, **settings}, captions)
            yield study.row(f"dp: {name}", plan) | {"compute": plan.plan.compute}
    study.call, study.truth = call, kept


def probed(study: Study) -> Iterator[dict[str, Any]]:
    for name, cache in PROBED.items() if study.probes else ():
        yield study.row(name, cache)


def speculated(study: Study) -> Iterator[dict[str, Any]]:
    """What is refused by a block that runs, beside the check at computed steps, none, and shorter intervals."""
    if not study.probes:
        return
    usual = {"method": "ab_cache", "site": "stack", "coordinate": "logsnr"}
    guards: dict[str, dict[str, Any]] = {"no guard": {}, "verify": {"guard": "verify"}} | {
        f"speca {bound}": {"guard": "speca", "verify_bound": bound} for bound in (0.3, 0.1, 0.03)
    }
    for interval in (3, 4):
        yield study.row(f"every {interval}: no guard", usual | {"interval": interval})
    for name, guard in guards.items():
        yield study.row(f"every 5: {name}", usual | {"interval": 5} | guard)
    plan = study.planned(round(study.call["num_inference_steps"] * 0.4), {"site": "stack"})
    default = study.call["guidance_scale"]
    study.call["guidance_scale"] = 7.5
    kept, study.truth = study.truth, study.drawn(None)[0]
    for name, guard in guards.items():
        yield study.row(f"guidance 7.5, dp: {name}", plan.model_copy(update=guard))
    study.truth, study.call["guidance_scale"] = kept, default


def parts_of(outputs: Tensor, grouping: str) -> list[Tensor]:
    """Outputs (images, ...) as parts whose inner products add up to theirs: channels, or bands of spatial frequency."""
    if grouping == "one":
        return [outputs]
    if grouping == "channels":
        return list(outputs.split(1, 1))
    spectrum = torch.fft.fft2(outputs.double(), norm="ortho")
    radius = torch.cartesian_prod(*(torch.fft.fftfreq(size, dtype=torch.float64) for size in outputs.shape[-2:]))
    radius = radius.norm(dim=1).reshape(outputs.shape[-2:])
    edges = {"2 bands": [0, 0.1, 1], "4 bands": [0, 0.05, 0.1, 0.2, 1]}[grouping]
    masks = [(radius >= low) & (radius < high) for low, high in pairwise(edges)]
    return [torch.view_as_real(spectrum * mask) for mask in masks]


def traced(study: Study, captions: Sequence[str]) -> tuple[list[Tensor], Any]:
    """Of the runs of some captions, outputs (images, steps, ...) that the solver was given; and the last run."""
    rows: dict[int, Tensor] = {}
    found: list[Tensor] = []
    runs: list[Any] = []

    def ended(run: Any) -> None:
        found.append(torch.stack([rows[index] for index in range(run.total)], 1))
        runs.append(run)

    def heard(clock: Any) -> None:
        clock.on_output.append(lambda index, value: rows.__setitem__(index, value.detach().clone()))
        clock.on_end.append(ended)

    study.drawn(None, captions, heard)
    return found, runs[-1]


def grams(outputs: Sequence[Tensor], grouping: str) -> list[Any]:
    """The mean Gram matrix over images, of each part of the outputs."""
    made: list[Any] = []
    for own in outputs:
        flat = own.flatten(0, 1)  # images and steps
        parts = [part.reshape(*own.shape[:2], -1).double() for part in parts_of(flat, grouping)]
        made.append(np.stack([(part @ part.mT).mean(0).numpy() for part in parts]))
    return list(np.mean(made, axis=0))


def grouped(study: Study) -> Iterator[dict[str, Any]]:
    """Weights fitted on known captions for each group by itself; the error of the final latents on the held-out ones,
    in dB less than with one group."""
    known, run = traced(study, study.known)
    held, _ = traced(study, study.held)
    fits, tests = ({name: grams(outputs, name) for name in GROUPINGS} for outputs in (known, held))
    solver = study.pipe.scheduler
    solver.set_timesteps(study.call["num_inference_steps"])
    moves, axis = influence(solver, run), run.coordinates("logsnr")
    for interval in (2, 3, 5):
        steps = [0, 1, *range(2, run.total, interval)]
        for order in (2, 3):
            for ridge in (0.0, 0.01):
                errors = {
                    grouping: error_of(fits[grouping], tests[grouping], axis, moves, steps, order, ridge)
                    for grouping in fits
                }
                gain = {name: round(10 * float(np.log10(errors["one"] / error)), 2) for name, error in errors.items()}
                print(interval, order, ridge, gain, file=sys.stderr)
                yield {"interval": interval, "order": order, "ridge": ridge, "db_gained": gain}


def error_of(
    fit: Sequence[Any], test: Sequence[Any], axis: Sequence[float], moves: Any, steps: list[int], order: int,
    ridge: float,
) -> float:  # fmt: skip
    """What skipping all but some steps costs on the tests' Gram matrices with weights of the fits', over all parts."""

    def predict(at: int, known: Sequence[int]) -> list[float]:
        return weights("adams_bashforth", order, 6.0, axis[at], [axis[k] for k in known])

    total = 0.0
    for own, held in zip(fit, test, strict=True):
        costs = Costs(own, predict, moves, ridge=ridge)
        total += sum(float(costs.groups(known, end, held)[-1]) for known, end in spans(steps, len(own)))
    return total


def main() -> int:
    torch.set_num_threads(1)
    parts = {"groups": grouped, "intervals": intervals, "plans": plans, "verify": guarded}
    parts |= {"objectives": objectives, "dicache": probed, "speca": speculated}
    asked = [part for part in parts if part in sys.argv] or [*parts]
    models = [model for model in CALL_DEFAULTS if model in sys.argv] or [*CALL_DEFAULTS]
    path = ROOT / "benchmarks" / "predictors.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {model: known.get(model, {}) for model in CALL_DEFAULTS}
    for model in models:
        study = Study(model)
        for part in asked:
            found[model][part] = list(parts[part](study))
            told = {"command": "python scripts/measure_predictors.py", "traced": KNOWN, "pictures": DRAWN, **found}
            output.write(path, lambda to, told=told: to.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
