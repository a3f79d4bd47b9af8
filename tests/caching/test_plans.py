"""What a plan says of a run that is not the one it was made on, and which files are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.caching.calibration import Drawing
from fastdiff.caching.methods.a_sdm import Ranked
from fastdiff.caching.methods.cachequant import Corrected
from fastdiff.caching.methods.magcache import Ratios
from fastdiff.caching.methods.teacache import Rescaling
from fastdiff.caching.plan import Plan, Schedule, quantization
from fastdiff.clock import Run
from fastdiff.errors import BadConfig
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.families import anatomies
from tests import tiny
from tests.laws.rows import origin
from tests.state import differences, snapshot

STEPS = 6  # of laws/rows.py, where `origin` comes from
KINDS: dict[str, tuple[type[Plan], dict[str, Any]]] = {
    "dp": (Schedule, {"compute": [0, 2, 4]}),
    "cachequant": (Corrected, {"compute": [0, 3]}),
    "magcache": (Ratios, {"ratios": [1.0] * STEPS}),
    "teacache": (Rescaling, {"coefficients": [1.0, 0.0], "r_squared": 0.9}),
    "a_sdm": (Ranked, {"sites": [["block 1", 0.4], ["block 2", 0.3]]}),
}


def plan_of(method: str, name: str = "sd3", **changes: Any) -> dict[str, Any]:
    kind, fields = KINDS[method]
    return json.loads(kind(**origin(name), **fields).model_dump_json()) | changes


def written(folder: Path, plan: dict[str, Any]) -> str:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    return str(file)


def notes_of(folder: Path, method: str, change: Any = None, **call: Any) -> list[str]:
    """What the report of a run says of the plan, where `change` was made to the pipeline."""
    pipe = tiny.make("sd3")
    if change is not None:
        change(pipe)
    handle = fastdiff.accelerate(pipe, cache={"method": method, "plan": written(folder, plan_of(method))})
    tiny.run(pipe, "sd3", **({"steps": STEPS} | call))
    return [note for note in handle.report.notes if "plan" in note]


def with_integers(pipe: Any) -> None:
    """A weight that only quantized models have."""
    pipe.transformer.register_buffer("weight_int8", torch.zeros(2, 2, dtype=torch.int8))


def other_solver(pipe: Any) -> None:
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize("method", KINDS)
def test_every_kind_of_plan_says_what_is_different(tmp_path, method):
    assert notes_of(tmp_path, method) == [], "the very run it was made on"
    assert notes_of(tmp_path, method, guidance_scale=7.0)[0] == "the plan was made with guidance 4, this run has 7"
    solver = notes_of(tmp_path, method, other_solver)
    assert (
        solver[0] == "the plan was made with FlowMatchEulerDiscreteScheduler, this run has DPMSolverMultistepScheduler"
    )
    assert notes_of(tmp_path, method, height=128) == ["the plan was made at 4x8x8, this run is at 4x16x8"]
    assert notes_of(tmp_path, method, with_integers) == ["the plan was made with plain weights, these are int8"]
    assert notes_of(tmp_path, method, steps=9) == [
        "the plan of 6 steps was re-mapped to the noise levels of these 9"
    ]  # fmt: skip


def test_what_is_quantized_is_told_from_what_holds_numbers_of_another_kind():
    pipe = tiny.make("pixart")
    (anatomy,) = anatomies(pipe)
    assert quantization(anatomy) is None
    pipe.transformer.register_buffer("positions", torch.arange(5))
    assert quantization(anatomy) is None, "a list of places"
    with_integers(pipe)
    pipe.transformer.register_buffer("eight", torch.zeros(2, 2, dtype=torch.float8_e4m3fn))
    assert quantization(anatomy) == "float8_e4m3fn+int8"
    half = tiny.make("pixart")
    half.transformer.to(torch.bfloat16)
    assert quantization(anatomies(half)[0]) is None


def test_the_origin_of_a_plan_is_that_of_its_run():
    pipe = tiny.make("sd3")
    (anatomy,) = anatomies(pipe)
    run = Run(1, (900.0, 500.0), (0.9, 0.5), True, "Solver", 3.5, (4, 8, 8))
    with_integers(pipe)
    made = Plan(**Drawing(anatomy, quantization(anatomy)).origin(run))
    assert (made.scheduler, made.guidance_scale, made.shape) == ("Solver", 3.5, (4, 8, 8))
    assert (made.sigmas, made.quantization) == ((0.9, 0.5), "int8")
    assert made.fits(run) and made.differences(run, anatomy) == []
    quiet = replace(run, guidance_scale=None, scheduler="", shape=())
    assert made.differences(quiet, anatomy) == [], "what is not known is not different"


@pytest.mark.parametrize("method", KINDS)
def test_a_plan_of_another_model_is_refused(tmp_path, method):
    pipe = tiny.make("pixart")
    before = snapshot(pipe)
    with pytest.raises(BadConfig, match=r"made for SD3Transformer2DModel \w+, this model is PixArtTransformer2DModel"):
        fastdiff.accelerate(pipe, cache={"method": method, "plan": written(tmp_path, plan_of(method))})
    assert differences(before, snapshot(pipe)) == []


PAIRS = [(a, b) for a in KINDS for b in KINDS if a != b]
PAIRS.remove(("cachequant", "dp"))  # a schedule alone is one with no corrections


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_a_plan_of_another_method_is_refused_by_name(tmp_path, method, other):
    file = written(tmp_path, plan_of(other))
    with pytest.raises(BadConfig, match=r"plan file '.*' was made for another method: \w+ is (missing|unknown)"):
        fastdiff.Config(cache={"method": method, "plan": file})


BROKEN = {
    "version": ({"version": 1}, "has version 1, this fastdiff reads 2; calibrate again"),
    "no version": ({"version": None}, "has version None"),
    "not a number": ({"sigmas": [float("nan")] * STEPS}, "is damaged: sigmas.0: .*"),
    "infinite": ({"sigmas": [float("inf")] * STEPS}, "is damaged: sigmas.0: .*"),
    "negative": ({"sigmas": [-1.0] * STEPS}, "is damaged: sigmas.0: .*greater than or equal to 0"),
    "no steps": ({"sigmas": []}, "is damaged: sigmas: .*"),
    "too many steps": ({"sigmas": [1.0] * 10_001}, "is damaged: sigmas: .*"),
    "a text for a number": ({"guidance_scale": "much"}, "is damaged: guidance_scale: .*"),
    "a long name": ({"denoiser": "x" * 1000}, "is damaged: denoiser: .*"),
}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plan_of_any_kind_gives_one_clear_sentence(tmp_path, method, case):
    changes, sentence = BROKEN[case]
    with pytest.raises(BadConfig, match=sentence) as error:
        fastdiff.Config(cache={"method": method, "plan": written(tmp_path, plan_of(method, **changes))})
    assert "\n" not in str(error.value) and "plan.json" in str(error.value)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("magcache", {"ratios": [float("nan")] * STEPS}),
        ("magcache", {"ratios": [-1.0] * STEPS}),
        ("teacache", {"coefficients": [float("inf")]}),
        ("a_sdm", {"sites": [["mid_block", 1.5]]}),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, method, changes):
    with pytest.raises(BadConfig, match="is damaged: "):
        fastdiff.Config(cache={"method": method, "plan": written(tmp_path, plan_of(method, **changes))})


def test_a_plan_is_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of("magcache"))[:150])
    with pytest.raises(BadConfig, match="is truncated or no JSON"):
        fastdiff.Config(cache={"method": "magcache", "plan": str(file)})
    file.write_bytes(b" " * (100 << 20))
    with pytest.raises(BadConfig, match=f"has {100 << 20} bytes, more than any plan"):
        fastdiff.Config(cache={"method": "magcache", "plan": str(file)})
    with pytest.raises(BadConfig, match="does not exist"):
        fastdiff.Config(cache={"method": "magcache", "plan": str(tmp_path / "none.json")})


@pytest.mark.parametrize(("method", "name"), [("magcache", "sd3"), ("magcache", "sd15"), ("teacache", "sd3")])
def test_calibration_measures_what_the_method_goes_by(method, name):
    """Ratios of magnitudes begin with 1; the polynomial explains some of what it was fitted to."""
    call = tiny.arguments(name, STEPS)
    for given in ("prompt", "negative_prompt", "generator", "output_type"):
        del call[given]
    config = fastdiff.Config(cache={"method": method})
    made = calibrate(tiny.make(name), config, ["a red cat", "a dog"], batch=2, **call)
    plan = made.cache.plan
    if method == "magcache":
        assert plan.ratios[0] == 1 and len(plan.ratios) == STEPS and all(0.2 < ratio < 5 for ratio in plan.ratios)
    else:
        assert 0 < plan.r_squared <= 1 and len(plan.coefficients) == 5
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe, fastdiff.Config.from_json(made.model_dump_json()))
    assert torch.isfinite(tiny.run(pipe, name, steps=STEPS)).all()
    assert [note for note in handle.report.notes if "plan" in note] == []
