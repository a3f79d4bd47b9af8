"""The guard verify: what it checks, when it is believed, what it computes, and that it never waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.caching import verify
from fastdiff.caching.plan import Schedule
from fastdiff.caching.verify import LATE, LEAST, MARGIN, USUAL, apart, bounds_of, forecast_errors
from fastdiff.errors import BadConfig
from tests import tiny
from tests.caching.fakes import answering, did, draw, run_of
from tests.caching.test_dp import planned

STEPS = 12
EVEN = {"method": "static", "compute_steps": list(range(0, STEPS, 2)), "of_steps": STEPS, "guard": "verify"}


def ran(cache: dict, *outputs: float):
    """The handle of a run in which the denoiser gives these at its steps, the last one for the rest."""
    times: list[float] = []
    pipe = answering(lambda timestep: outputs[min(times.index(timestep), len(outputs) - 1)])
    handle = fastdiff.accelerate(pipe, cache=cache)
    handle.clock.on_start.append(lambda run: times.extend(run.timesteps))
    draw(pipe, STEPS)
    return handle


def steps_of(handle) -> list[int]:
    return [index for index, computed in enumerate(did(handle)) if computed]


def test_a_jump_is_computed_after_it_was_seen_until_forecasts_hold_again():
    """From 1 to 3 at step 5: seen at step 6, believed at 8; what is computed at 9 was forecast from 8, and holds."""
    handle = ran(EVEN, 1, 1, 1, 1, 1, 3)
    assert steps_of(handle) == [0, 2, 4, 6, 8, 9, 10]
    assert handle.report.to_dict()["verified"] == {"checked": 6, "failed": 1, "computed": 1}
    assert "verify: 6 checked, 1 failed, 1 computed" in str(handle.report) and handle.report.notes == []


def test_the_verdict_never_decides_the_step_after_it():
    """At step 7 the newest number is that of step 4, though step 6 has failed."""
    assert 7 not in steps_of(ran(EVEN, 1, 1, 1, 1, 1, 3)) and LATE == 2


def test_what_jumps_at_every_step_is_computed_from_then_on():
    handle = ran(EVEN | {"predictor": "reuse"}, *[3.0**k for k in range(STEPS)])
    assert steps_of(handle) == [0, 2, *range(4, STEPS)]
    assert handle.report.verified["failed"] == handle.report.verified["checked"] == STEPS - 3


@pytest.mark.parametrize(("bound", "fails"), [(0.66, True), (0.67, False)])
def test_the_bound_is_of_the_error_relative_to_what_was_computed(bound, fails):
    """|1 - 3| / 3"""
    handle = ran(EVEN | {"verify_bound": bound}, 1, 1, 1, 1, 1, 3)
    assert (handle.report.verified["failed"] == 1) is fails and (9 in steps_of(handle)) is fails


def test_the_forecast_is_the_predictors_own():
    """A line is no surprise to a line, but to reuse."""
    line = [1.0 + 4 * k for k in range(STEPS)]
    told = EVEN | {"verify_bound": 0.01, "coordinate": "step", "compute_steps": [0, 1, 3, 6, 9]}
    assert ran(told | {"predictor": "adams_bashforth"}, *line).report.verified["failed"] == 1, "step 1 has one value"
    assert ran(told, *line).report.verified["failed"] > 4


@pytest.mark.parametrize(
    "cache",
    [
        EVEN,
        EVEN | {"predictor": "adams_bashforth"},
        {"method": "ab_cache", "interval": 3},
        {"method": "fora", "interval": 3},
        {"method": "pab", "between": [0, 1]},
        {"method": "a_sdm", "interval": 3, "sites": ["*"]},
        {"method": "tgate", "guidance": "keep"},
        {"method": "faster_diffusion", "interval": 3, "max_parallel": 1, "noise": 0},
    ],
    ids=lambda cache: cache["method"],
)
@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_a_bound_that_nothing_reaches_is_the_plan_to_the_bit_and_0_computes_all(cache, name):
    plain = {key: value for key, value in cache.items() if key != "guard"}
    results = []
    for settings in (plain, plain | {"guard": "verify", "verify_bound": 1e30}):
        pipe = tiny.make(name)
        handle = fastdiff.accelerate(pipe, cache=settings)
        results.append((tiny.run(pipe, name, steps=STEPS), handle.report.branches))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert handle.report.verified["checked"] > 0 and handle.report.verified["computed"] == 0
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe, cache=plain | {"guard": "verify", "verify_bound": 0})
    wanted = tiny.run(tiny.make(name), name, steps=STEPS)
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), wanted) and handle.report.cached == 0


def test_without_the_guard_nothing_is_checked_and_nothing_said():
    handle = ran({key: value for key, value in EVEN.items() if key != "guard"}, 1, 2, 4)
    assert handle.report.verified == {} and "verify" not in str(handle.report)


def test_both_branches_decide_together():
    """Of two calls a step, one of which fails, neither is left out."""
    pipe = tiny.make("wan")
    handle = fastdiff.accelerate(pipe, cache=EVEN | {"verify_bound": 1e-4})
    tiny.run(pipe, "wan", steps=STEPS)
    assert handle.report.branches[0] == handle.report.branches[1]
    assert handle.report.verified["computed"] > 0 and handle.report.partly == 0


def test_a_number_is_looked_at_two_steps_after_it_was_made(monkeypatch):
    """By then a whole step has been launched behind it."""
    looks: list[tuple[int, int]] = []

    class Watched(verify.Reading):
        def __init__(self, scalar):
            super().__init__(scalar)
            self.made = clock.index

        def __float__(self):
            looks.append((self.made, clock.index))
            return super().__float__()

    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache=EVEN)
    clock = handle.clock
    monkeypatch.setattr(verify, "Reading", Watched)
    clock.on_tick.append(lambda index: looks.append((index, -1)) if index == STEPS - 1 else None)
    tiny.run(pipe, "pixart", steps=STEPS)
    before = looks[: looks.index((STEPS - 1, -1))]
    assert before and all(now - made >= LATE for made, now in before)
    assert len(before) == len(set(before)), "each number once"


def test_a_compiled_denoiser_is_guarded_alike():
    """What is predicted before it is entered, and all that is compared outside of it."""
    results = []
    for ahead in (False, True):
        pipe = tiny.make("pixart")
        handle = fastdiff.accelerate(pipe, cache=EVEN | {"site": "stack", "verify_bound": 0.02})
        for session in {callback.__self__ for callback in handle.clock.on_start if hasattr(callback.__self__, "ahead")}:
            session.ahead = ahead
        results.append((tiny.run(pipe, "pixart", steps=STEPS), handle.report.verified))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert results[0][1]["failed"] > 0


def test_a_second_run_begins_without_the_verdicts_of_the_first():
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache=EVEN | {"verify_bound": 0.02})
    first, said = tiny.run(pipe, "pixart", steps=STEPS), dict(handle.report.verified)
    assert torch.equal(tiny.run(pipe, "pixart", steps=STEPS), first) and handle.report.verified == said


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({"method": "first_block"}, "first_block decides at each step, by its threshold; guards check .* take static"),
        ({"method": "faster_diffusion"}, "max_parallel = 8 decodes steps before .*; set max_parallel = 1"),
        ({"method": "static", "compute_steps": [0], "verify_bound": -1}, "verify_bound"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_what_to_do(cache, said):
    with pytest.raises(BadConfig, match=said) as told:
        fastdiff.Config(cache=cache | {"guard": "verify"})
    assert "\n" not in str(told.value)


# the numbers


def test_the_error_is_that_of_all_leaves_together():
    truth = [torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]], dtype=torch.float16)]
    forecast = [torch.tensor([3.0, 1.0]), None, torch.tensor([[2.0]], dtype=torch.float16)]
    assert float(apart(forecast, truth)) == pytest.approx((1 + 4) ** 0.5 / 5)
    assert not float(apart([torch.tensor([float("nan")])], [torch.ones(1)])) < 1e30
    assert float(apart([torch.ones(1)], [torch.zeros(1)])) > 1e30


def test_what_calibration_saw_is_the_worst_run_of_each_computed_step():
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(3, 6, 9)).cumsum(1)
    grams = runs @ runs.transpose(0, 2, 1)
    found = forecast_errors(grams, lambda at, known: [-0.5, 1.5][-len(known) :] if len(known) > 1 else [1.0], [0, 2, 5])
    first = np.linalg.norm(runs[:, 0] - runs[:, 2], axis=1) / np.linalg.norm(runs[:, 2], axis=1)
    then = 1.5 * runs[:, 2] - 0.5 * runs[:, 0] - runs[:, 5]
    second = np.linalg.norm(then, axis=1) / np.linalg.norm(runs[:, 5], axis=1)
    assert found == {2: pytest.approx(first.max()), 5: pytest.approx(second.max())}


def test_a_plans_bound_is_what_was_seen_at_its_next_computed_step_with_a_margin():
    assert bounds_of({2: 0.2, 4: 0.0}, 6) == [MARGIN * 0.2] * 3 + [LEAST] * 3
    run = run_of(6)
    plan = Schedule(denoiser="x", scheduler="y", sigmas=run.sigmas, compute=[0, 2, 4], forecasts={2: 0.2, 4: 0.1})
    method = fastdiff.Config(cache={"method": "dp", "guard": "verify", "plan": plan}).cache
    assert method.bounds(run) == pytest.approx([MARGIN * 0.2] * 3 + [MARGIN * 0.1] * 3)
    assert method.bounds(run_of(7)) == [USUAL] * 7, "of other steps it knows nothing"
    told = method.model_copy(update={"verify_bound": 0.3})
    assert told.bounds(run) == [0.3] * 6


@pytest.mark.parametrize("settings", [{}, {"site": "inner"}, {"predictor": "spectrum", "order": 3}])
def test_a_calibrated_plan_says_what_its_forecasts_are_worth_and_holds_on_what_it_was_made_on(settings):
    config = planned("sd15", computed=4, **settings)
    plan = config.cache.plan
    assert plan.forecasts.keys() == set(plan.compute[1:]) and all(error > 0 for error in plan.forecasts.values())
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, fastdiff.Config(cache=config.cache.model_copy(update={"guard": "verify"})))
    tiny.run(pipe, "sd15", steps=8)
    assert handle.report.verified == {"checked": 3, "failed": 0, "computed": 0}
