"""CacheQuant: its groups, its correction, and its plan, calibrated on tiny pipelines."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.affine import Affine, AffineFit, corrected
from fastdiff.caching.base import CacheMethod
from fastdiff.caching.calibration import Shadow
from fastdiff.caching.methods import cachequant
from fastdiff.caching.schedule import Costs, spans
from fastdiff.caching.trace import SiteTrace
from fastdiff.errors import BadConfig
from fastdiff.pipelines.calibrate import Observed, calibrate, put
from fastdiff.pipelines.families import anatomies
from tests import tiny
from tests.caching.fakes import did

STEPS = 10
PROMPTS = ["a red cat", "a dog"]


def arguments(name: str) -> dict:
    told = tiny.arguments(name, STEPS)
    for given in ("prompt", "negative_prompt", "generator", "output_type"):
        del told[given]
    return told | ({"negative_prompt": ["bad", "bad"]} if name == "flux" else {})


def planned(name: str, **settings) -> fastdiff.Config:
    config = fastdiff.Config(cache={"method": "cachequant", **settings})
    return calibrate(tiny.make(name), config, PROMPTS, batch=2, **arguments(name))


@pytest.fixture(scope="module")
def sd15() -> fastdiff.Config:
    return planned("sd15", interval=3)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_groups_hold_between_half_and_twice_the_interval(name, interval):
    plan = planned(name, interval=interval, correct=False).cache.plan
    sizes = np.diff([*plan.compute, STEPS])
    assert len(plan.compute) == math.ceil(STEPS / interval)
    assert all(math.ceil(interval / 2) <= size <= 2 * interval for size in sizes[:-1])
    assert 1 <= sizes[-1] <= 2 * interval, "the end of the run cuts the last one short"


def test_guards_hold_in_the_plan():
    plan = planned("sd15", interval=3, warmup_steps=2, cooldown_steps=2, correct=False).cache.plan
    assert {0, 1, STEPS - 2, STEPS - 1} <= set(plan.compute)


@pytest.mark.parametrize(("interval", "predictor"), [(2, "reuse"), (3, "reuse"), (3, "adams_bashforth"), (4, "reuse")])
def test_the_plan_is_the_best_of_all_within_these_bounds(monkeypatch, interval, predictor):
    """On the Gram matrix that calibration itself gathers, against every list of steps there is."""
    method = fastdiff.Config(cache={"method": "cachequant", "interval": interval, "predictor": predictor}).cache
    pipe, trace, runs = tiny.make("sd15"), SiteTrace(), []
    monkeypatch.setattr(cachequant, "SiteTrace", lambda: trace)
    config = fastdiff.Config(cache=method.model_copy(update={"correct": False}))
    made = calibrate(pipe, config, PROMPTS, batch=2, **arguments("sd15")).cache.plan
    assert trace.gram.shape == (STEPS, STEPS)
    with fastdiff.accelerate(pipe) as handle:
        handle.clock.on_start.append(runs.append)
        tiny.run(pipe, "sd15", steps=STEPS)
    costs = Costs(trace.gram, CacheMethod.weigher(method, runs[0]), longest=2 * interval - 1)

    def within(steps) -> bool:
        sizes = np.diff([*steps, STEPS])
        return max(sizes) <= 2 * interval and all(size >= math.ceil(interval / 2) for size in sizes[:-1])

    def cost(steps) -> float:
        return sum(float(costs.groups(known[-2:], end)[-1]) for known, end in spans(steps, STEPS))

    count = math.ceil(STEPS / interval)
    every = [steps for rest in combinations(range(1, STEPS), count - 1) if within(steps := (0, *rest))]
    assert made.compute in every
    best = min(map(cost, every))
    assert cost(made.compute) <= best * (1 + 1e-9) + 1e-12


# the correction


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 7, 3), (2, 3, 2, 4, 4)])
def test_without_ridge_the_fit_is_that_of_least_squares(shape):
    """By channel: the second dimension of maps, the last of tokens; added in any number of parts."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=generator) + 3, torch.randn(shape, generator=generator) * 2 - 1
    fit = AffineFit(0.0)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        fit.add(part_x, part_y)
    scale, shift = fit.solve()
    axis = 1 if len(shape) > 3 else -1
    for channel, (a, b) in enumerate(zip(scale, shift, strict=True)):
        own_x, own_y = (t.movedim(axis, -1)[..., channel].flatten().double().numpy() for t in (x, y))
        best = np.linalg.lstsq(np.stack([own_x, np.ones_like(own_x)], 1), own_y, rcond=None)[0]
        assert (float(a), float(b)) == pytest.approx(tuple(best), rel=1e-6, abs=1e-8)
    made = corrected(x, scale, shift)
    shape_of = [1] * len(shape)
    shape_of[axis] = -1
    assert torch.allclose(made, x * scale.float().view(shape_of) + shift.float().view(shape_of), atol=1e-5)
    assert made.dtype == x.dtype and corrected(x.half(), scale, shift).dtype == torch.float16


def test_a_ridge_pulls_the_scale_to_1_and_a_constant_channel_is_only_shifted():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, 2, generator=generator)
    x[..., 1] = 4.0
    fit = AffineFit(1e9)
    fit.add(x, 3 * x + 1)
    scale, shift = fit.solve()
    assert scale.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert float(shift[1]) == pytest.approx(9)
    assert float(shift[0]) == pytest.approx(float((2 * x[..., 0] + 1).mean()), rel=1e-4)


def test_a_correction_survives_being_written_down():
    generator = torch.Generator().manual_seed(0)
    scale, shift = (torch.randn(5, generator=generator) for _ in range(2))
    again = Affine.model_validate_json(Affine.of(scale, shift).model_dump_json()).tensors()
    assert torch.equal(again[0], scale) and torch.equal(again[1], shift)
    for broken in ("not base64!", "AAA=", "abc"):
        with pytest.raises(ValueError, match="a correction is not float32 numbers in base64"):
            Affine(scale=broken, shift=broken)
    with pytest.raises(ValueError, match="a number that is not finite"):
        Affine.of(torch.tensor([float("nan")]), torch.tensor([0.0]))


def error_of_the_site(name: str, config: fastdiff.Config) -> float:
    """Squared error of what cached steps put in place, over the calibration's own runs."""
    sums: list[float] = []

    def seen(_step, _number, predicted, truth):
        sums.append(sum(float((p - t).pow(2).sum()) for p, t in zip(predicted, truth, strict=True) if p is not None))
        return predicted

    pipe = tiny.make(name)
    found = anatomies(pipe)
    method = config.cache
    handle = Observed(
        pipe,
        fastdiff.Config(),
        {found[0].component: lambda anatomy, clock, recorder: Shadow(method, anatomy, clock, recorder, seen)},
    )
    put(handle, found)
    generators = [torch.Generator().manual_seed(k) for k in range(len(PROMPTS))]
    pipe(PROMPTS, generator=generators, output_type="latent", **arguments(name))
    handle.restore()
    return sum(sums)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_correction_makes_the_cached_site_more_right_on_what_it_was_fitted_to(name):
    config = planned(name, interval=3)
    off = config.model_copy(update={"cache": config.cache.model_copy(update={"correct": False})})
    plain, better = error_of_the_site(name, off), error_of_the_site(name, config)
    assert 0 < better < 0.95 * plain


def test_the_plan_corrects_every_cached_step_and_only_those(sd15):
    plan = sd15.cache.plan
    assert set(plan.affine) == set(range(STEPS)) - set(plan.compute)
    assert plan.error is not None and plan.error > 0
    assert plan.summary().endswith(f"corrections for {len(plan.affine)} cached steps")


def test_a_correction_changes_the_picture_and_holds_for_its_own_steps_only(sd15):
    pictures = []
    for correct in (True, False):
        pipe = tiny.make("sd15")
        handle = fastdiff.accelerate(pipe, cache=sd15.cache.model_copy(update={"correct": correct}))
        pictures.append(tiny.run(pipe, "sd15", steps=STEPS))
        assert [i for i, computed in enumerate(did(handle)) if computed] == list(sd15.cache.plan.compute)
        assert handle.report.notes == []
        tiny.run(pipe, "sd15", steps=STEPS + 2)
        left_out = "the correction by channel is left out: it holds for the steps of the plan only"
        assert (left_out in handle.report.notes) == correct
    assert torch.isfinite(pictures[0]).all() and not torch.equal(*pictures)


def test_a_plan_survives_json_and_is_refused_on_another_model(tmp_path, sd15):
    assert fastdiff.Config.from_json(sd15.model_dump_json()) == sd15
    file = tmp_path / "plan.json"
    file.write_text(sd15.cache.plan.model_dump_json())
    by_path = fastdiff.Config(cache={"method": "cachequant", "plan": str(file)})
    assert by_path.cache.plan == sd15.cache.plan
    with pytest.raises(BadConfig, match="the plan was made for UNet2DConditionModel"):
        fastdiff.accelerate(tiny.make("sdxl"), by_path)
    with pytest.raises(BadConfig, match="made for another method: affine is unknown to it"):
        fastdiff.Config(cache={"method": "dp", "plan": str(file)})
    with pytest.raises(BadConfig, match="needs a plan: make one with fastdiff calibrate"):
        fastdiff.accelerate(tiny.make("sd15"), cache="cachequant")


def test_a_damaged_correction_is_refused(tmp_path, sd15):
    plan = json.loads(sd15.cache.plan.model_dump_json())
    step = next(iter(plan["affine"]))
    plan["affine"][step]["0"]["scale"] = "AAAAf"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BadConfig, match=r"is damaged: .*base64"):
        fastdiff.Config(cache={"method": "cachequant", "plan": str(tmp_path / "plan.json")})


def test_calibration_is_deterministic_and_leaves_no_trace(sd15):
    assert planned("sd15", interval=3) == sd15
