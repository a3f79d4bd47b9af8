"""The method dp: calibrated, used, re-mapped to other runs, refused where it makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.caching.methods.dp import DP
from fastdiff.caching.plan import LARGEST, Schedule
from fastdiff.clock import Run
from fastdiff.config import layers_of, resolve
from fastdiff.errors import BadConfig
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.families import anatomies
from tests import tiny
from tests.state import differences, snapshot

STEPS = 8


def planned(name: str, computed: int = 4, pipe=None, **settings) -> fastdiff.Config:
    """The config with a plan for the tiny pipeline."""
    call = tiny.arguments(name, STEPS)
    for given in ("prompt", "negative_prompt", "generator", "output_type"):
        del call[given]
    call |= {"negative_prompt": ["bad", "bad"]} if name == "flux" else {}  # without, it leaves guidance out
    config = fastdiff.Config(cache={"method": "dp", "computed_steps": computed, **settings})
    return calibrate(pipe or tiny.make(name), config, ["a red cat", "a dog"], batch=2, **call)


@pytest.fixture(scope="module")
def sd15() -> fastdiff.Config:
    return planned("sd15")


@pytest.fixture
def plan(sd15) -> dict:
    """A plan as a file holds it."""
    return json.loads(sd15.cache.plan.model_dump_json())


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_a_plan_computes_its_steps_and_predicts_the_rest(name, sd15):
    config = sd15 if name == "sd15" else planned(name)
    plan = config.cache.plan
    assert plan.compute[0] == 0 and len(plan.compute) == 4 and len(plan.sigmas) == STEPS
    assert plan.weights.keys() == set(range(STEPS)) - set(plan.compute)
    assert plan.error is not None and plan.error > 0
    pipe = tiny.make(name)
    exact = tiny.run(pipe, name, steps=STEPS)
    fast = fastdiff.accelerate(pipe, config)
    cached = tiny.run(pipe, name, steps=STEPS)
    assert [i for i, did in enumerate(fast.report.branches[0]) if did == "computed"] == list(plan.compute)
    assert fast.report.notes == []
    assert float((cached - exact).norm() / exact.norm()) < 0.2


def test_calibration_leaves_the_pipeline_as_it_was():
    pipe = tiny.make("sd15")
    planned("sd15", pipe=pipe)
    before = snapshot(pipe)
    again = planned("sd15", pipe=pipe)
    assert differences(before, snapshot(pipe)) == []
    assert again == planned("sd15"), "deterministic"


def test_guards_and_longest_hold_in_the_plan():
    made = planned("sd15", computed=5, warmup_steps=2, cooldown_steps=1, max_consecutive_cached=2).cache.plan
    assert {0, 1, STEPS - 1} <= set(made.compute) and len(made.compute) == 5
    assert max(np.diff(made.compute)) <= 3


@pytest.mark.parametrize("settings", [{"predictor": "reuse"}, {"order": 1}])
def test_the_plan_is_made_for_the_predictor_that_is_used(settings):
    made = planned("sd15", **settings).cache.plan
    for step, pairs in made.weights.items():
        assert pairs == ((max(c for c in made.compute if c < step), 1.0),)


def test_fitted_weights_predict_a_smaller_error():
    errors = [planned("sd15", predictor="reuse", order=1, ridge=ridge).cache.plan.error for ridge in (0.0, None)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("computed", "allowed"), [(1, {"longest": 3}), (9, {}), (2, {"cooldown_steps": 3})])
def test_an_impossible_number_of_computed_steps_is_refused_in_the_first_run(computed, allowed):
    with pytest.raises(BadConfig, match=rf"computed_steps = {computed}: a run of 8 takes \d to 8"):
        planned("sd15", computed=computed, **allowed)


def test_what_takes_no_plan_is_refused():
    pipe = tiny.make("sd15")
    for config, reason in (
        (fastdiff.Config(cache="deepcache"), "the cache method deepcache has nothing to calibrate"),
        (fastdiff.Config(), "needs a cache"),
    ):
        with pytest.raises(BadConfig, match=reason):
            calibrate(pipe, config, ["a cat"])
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()
    with pytest.raises(BadConfig, match="adds noise of its own; calibrate with a deterministic solver"):
        planned("sd15", pipe=pipe)
    with pytest.raises(BadConfig, match="refuses: "):
        calibrate(tiny.make("sd15"), fastdiff.Config(cache="dp"), ["a cat"], callback_on_step_end_tensor_inputs=["x"])
    with pytest.raises(BadConfig, match="needs a plan: make one with fastdiff calibrate"):
        fastdiff.accelerate(tiny.make("sd15"), cache="dp")


# another run than the one that was traced


def report_of(config, name: str = "sd15", pipe=None, **call):
    pipe = pipe or tiny.make(name)
    fast = fastdiff.accelerate(pipe, config)
    assert torch.isfinite(tiny.run(pipe, name, **({"steps": STEPS} | call))).all()
    return fast.report


def test_another_number_of_steps_computes_the_same_share(sd15):
    for steps, computed in ((4, 2), (12, 6), (16, 8), (1, 1)):
        report = report_of(sd15, steps=steps)
        assert report.computed == computed
        assert report.notes[0] == f"the plan of 8 steps was re-mapped to the noise levels of these {steps}"


def test_another_solver_or_guidance_is_said(sd15):
    pipe = tiny.make("sd15")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    report = report_of(sd15, pipe=pipe)
    assert "the plan was made with DDIMScheduler, this run has DPMSolverMultistepScheduler" in report.notes
    assert report.computed == 4
    report = report_of(sd15, guidance_scale=7.5)
    assert report.notes == ["the plan was made with guidance 4, this run has 7.5"]
    assert [i for i, did in enumerate(report.branches[0]) if did == "computed"] == list(sd15.cache.plan.compute)


def test_a_late_start_takes_the_end_of_the_plan(sd15):
    plan = sd15.cache.plan
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.make("sd15"))
    pipe.set_progress_bar_config(disable=True)
    fast = fastdiff.accelerate(pipe, sd15)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    pipe("a cat", image=image, num_inference_steps=STEPS, strength=0.5, output_type="latent", guidance_scale=4.0)
    assert (fast.report.total, fast.report.computed) == (STEPS // 2, len(plan.compute) // 2)
    assert any("re-mapped" in note for note in fast.report.notes)


def run_at(*sigmas: float) -> Run:
    return Run(1, tuple(1000 * s for s in sigmas), sigmas, True)


def test_steps_are_re_mapped_to_where_the_plan_computes():
    plan = Schedule(denoiser="x", scheduler="y", sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1], compute=[0, 1, 2, 4])
    assert plan.steps(run_at(*plan.sigmas)) == (0, 1, 2, 4)
    assert plan.steps(run_at(0.6, 0.4, 0.2, 0.1)) == (0, 1, 3), "the same run, begun later"
    twice = plan.steps(run_at(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05))
    assert len(twice) == 8 and twice[0] == 0 and twice[:4] == (0, 1, 2, 3)
    assert plan.steps(run_at(0.01)) == (0,)
    noisier = plan.steps(run_at(1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1))
    assert max(np.diff(noisier)) <= 3, "what is noisier than the plan is not one long gap"
    assert plan.steps(run_at(0.1, 0.05))[0] == 0, "less noise than in the plan"
    every = Schedule(denoiser="x", scheduler="y", sigmas=plan.sigmas, compute=range(6))
    assert every.steps(run_at(14.0, 3.0, 0.5)) == (0, 1, 2)


@pytest.mark.parametrize("seed", range(20))
def test_re_mapped_steps_are_always_steps(seed):
    rng = np.random.default_rng(seed)
    grid = np.sort(rng.uniform(0, 14, 20))[::-1]
    compute = [0, *sorted(rng.choice(np.arange(1, 20), size=rng.integers(0, 19), replace=False).tolist())]
    plan = Schedule(denoiser="x", scheduler="y", sigmas=grid.tolist(), compute=compute)
    sigmas = np.sort(rng.uniform(0, 20, rng.integers(1, 40)))[::-1]
    steps = plan.steps(run_at(*sigmas.tolist()))
    assert steps[0] == 0 and list(steps) == sorted(set(steps)) and steps[-1] < len(sigmas)


def test_guards_that_compute_more_than_the_plan_fall_back_to_the_predictors_weights(sd15):
    method = sd15.cache.model_copy(update={"cooldown_steps": 2, "order": 3})
    report = report_of(fastdiff.Config(cache=method))
    assert set(sd15.cache.plan.compute) | {6, 7} == {i for i, did in enumerate(report.branches[0]) if did == "computed"}


# what names a model


def test_the_fingerprint_tells_models_apart_and_survives_saving(tmp_path):
    (anatomy,) = anatomies(tiny.make("sd15"))
    other = anatomies(tiny.make("sd15_two_layers"))[0]
    assert fingerprint(anatomy) == fingerprint(anatomies(tiny.make("sd15"))[0]) != fingerprint(other)
    anatomy.denoiser.save_pretrained(tmp_path)
    again = type(anatomy.denoiser).from_pretrained(tmp_path)
    assert fingerprint(Anatomy(again, "unet", anatomy.family, True)) == fingerprint(anatomy)


def test_adapters_do_not_change_the_fingerprint(sd15):
    from peft import LoraConfig

    pipe = tiny.make("sd15")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert report_of(sd15, pipe=pipe).computed == 4


def test_a_plan_of_another_model_is_refused(sd15):
    pipe = tiny.make("sd15_two_layers")
    before = snapshot(pipe)
    with pytest.raises(BadConfig, match=r"made for UNet2DConditionModel \w+, this model is UNet2DConditionModel \w+"):
        fastdiff.accelerate(pipe, sd15)
    assert differences(before, snapshot(pipe)) == []


# files


def test_the_largest_plan_that_is_read_is_below_100_mb():
    assert LARGEST < 100 << 20


def test_a_plan_is_the_same_from_a_file_and_inside_a_config(tmp_path, monkeypatch, sd15, plan):
    (tmp_path / "plans").mkdir()
    file = tmp_path / "plans" / "plan.json"
    file.write_text(json.dumps(plan))
    by_path = fastdiff.Config(cache={"method": "dp", "plan": str(file), "computed_steps": 4})
    assert by_path == sd15
    assert fastdiff.Config.from_json(by_path.model_dump_json()) == sd15
    toml = tmp_path / "plans" / "c.toml"
    toml.write_text('[cache]\nmethod = "dp"\ncomputed_steps = 4\nplan = "plan.json"\n')
    assert resolve(layers_of(toml)).config == sd15, "relative to the file that names it"
    toml.write_text(f'[cache]\nmethod = "dp"\ncomputed_steps = 4\nplan = "{file}"\n')
    assert resolve(layers_of(toml)).config == sd15
    monkeypatch.chdir(file.parent)
    assert fastdiff.accelerate(tiny.make("sd15"), cache={"method": "dp", "plan": "plan.json"}).config.cache.plan


BROKEN = {
    "missing": (None, "does not exist; make one with fastdiff calibrate"),
    "truncated": (lambda plan: json.dumps(plan)[:200], "is truncated or no JSON"),
    "not text": (lambda plan: b"\xff\xfe\x00", "is truncated or no JSON"),
    "another kind": (lambda plan: '{"cache": {"method": "deepcache"}}', "holds no plan"),
    "a list": (lambda plan: "[1, 2]", "holds no plan"),
    "version": (lambda plan: json.dumps(plan | {"version": 1}), "has version 1, this fastdiff reads 2; calibrate"),
    "larger than any plan": (lambda plan: b" " * (100 << 20), f"has {100 << 20} bytes, more than any plan"),
    "deeply nested": (lambda plan: "[" * 100_000, "is truncated or no JSON"),
    "unknown key": (lambda plan: json.dumps(plan | {"more": 1}), "made for another method: more is unknown"),
    "of another method": (
        lambda plan: json.dumps({k: v for k, v in plan.items() if k not in ("compute", "weights", "error")}),
        "made for another method: compute is missing",
    ),
    "negative noise": (lambda plan: json.dumps(plan | {"sigmas": [1.0, -0.5] * 4}), "damaged: sigmas.1: "),
    "not a number": (lambda plan: json.dumps(plan | {"sigmas": [float("nan")] * 8}), "damaged: sigmas.0: .*finite"),
    "infinite weight": (
        lambda plan: json.dumps(plan | {"compute": [0], "weights": {"1": [[0, float("inf")]]}}),
        "damaged: weights.1.0.1: .*finite",
    ),
    "step beyond": (lambda plan: json.dumps(plan | {"compute": [0, 8]}), "computes step 8 of a run of 8"),
    "not from 0": (lambda plan: json.dumps(plan | {"compute": [1, 2]}), "must start with 0 and rise"),
    "no order": (lambda plan: json.dumps(plan | {"compute": [0, 3, 2]}), "must start with 0 and rise"),
    "no steps": (lambda plan: json.dumps(plan | {"compute": []}), "damaged: compute: "),
    "weights beyond": (
        lambda plan: json.dumps(plan | {"weights": {"9": [[0, 1.0]]}}),
        "has weights for step 9, which is not one of the steps it skips",
    ),
    "weights of a computed step": (
        lambda plan: json.dumps(plan | {"weights": {"0": [[0, 1.0]]}}),
        "weights for step 0",
    ),
    "weights of what is not there": (
        lambda plan: json.dumps(plan | {"compute": [0, 5], "weights": {"2": [[5, 1.0]]}}),
        "makes step 2 of step 5, which is not computed before it",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gives_one_clear_sentence(tmp_path: Path, plan, case):
    make, sentence = BROKEN[case]
    file = tmp_path / "plan.json"
    if make is not None:
        text = make(plan)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadConfig, match=sentence) as error:
        fastdiff.Config(cache={"method": "dp", "plan": str(file)})
    told = str(error.value)
    assert "\n" not in told and "pydantic" not in told and str(file) in told


def test_the_default_method_without_a_plan_is_a_valid_config():
    assert DP().plan is None
