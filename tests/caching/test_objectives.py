"""Objectives of dp: MeanCache's by its definition, LeMiCa's order by brute force, its errors by runs of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.caching.objectives import SHARPNESS, MeanVelocity, least_worst
from fastdiff.caching.schedule import Costs, optimal_steps, spans
from fastdiff.errors import BadConfig
from fastdiff.pipelines.calibrate import calibrate
from tests import tiny
from tests.caching.test_dp import planned
from tests.caching.test_schedule import allowed, cost_of, traced
from tests.caching.test_two_denoisers import CALL, two

STEPS = 5


def of_velocity(costs: Costs, **changes) -> MeanVelocity:
    told = {"gram": costs.gram, "predict": costs.predict, "influence": costs.influence, "longest": costs.longest}
    return MeanVelocity(**(told | changes))


def deviation(outputs, costs, known, end) -> float:
    """By the definition: true and estimated displacement over a group, over its length."""
    c = costs.influence
    truth = sum(c[i] * outputs[i] for i in range(known[-1], end))
    made = c[known[-1]] * outputs[known[-1]]
    for at in range(known[-1] + 1, end):
        made = made + c[at] * sum(factor * outputs[k] for k, factor in costs.weights(at, known[-2:]))
    return float(np.linalg.norm(made - truth) / np.abs(c[known[-1] : end]).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.data())
def test_meancache_has_the_least_sum_of_peaks_of_mean_velocities_errors(seed, total, data):
    budget, longest = data.draw(st.integers(1, total)), data.draw(st.integers(1, 8))
    outputs, *_, plain = traced(seed, total, longest=longest)
    costs = of_velocity(plain)
    every = list(allowed(total, budget, (), costs.longest))
    if not every:
        return
    largest = max(
        deviation(outputs, costs, [j - a, j] if a else [j], end)
        for j in range(total) for a in (range(1, min(j, costs.longest + 1) + 1) if j else (0,))
        for end in range(j + 1, min(total, j + costs.longest + 1) + 1)
    )  # fmt: skip

    def price(steps) -> float:
        errors = [deviation(outputs, costs, known, end) for known, end in spans(list(steps), total)]
        return sum(np.expm1(SHARPNESS * np.array(errors) / max(largest, 1e-300)))

    chosen, least = optimal_steps(costs.table(), budget), min(map(price, every))
    assert chosen in every and price(chosen) <= least * (1 + 1e-6) + 1e-6
    assert cost_of(costs.table(), chosen) == pytest.approx(price(chosen), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("predict", [lambda at, known: [1.0], lambda at, known: [-1.0, 2.0][-len(known) :]])
def test_a_constant_velocity_costs_nothing_and_all_steps_leave_out_nothing(predict):
    velocity = np.tile(np.array([3.0, -1.0]), (9, 1))
    sums = lambda at, known: predict(at, known) if len(known) > 1 else [1.0]  # noqa: E731 - factors add up to 1
    table = MeanVelocity(velocity @ velocity.T, sums, np.linspace(1, 2, 9), longest=4).table()
    assert np.abs(table[np.isfinite(table)]).max() < 1e-6
    *_, costs = traced(1, 9)
    assert optimal_steps(of_velocity(costs).table(), 9) == [*range(9)]
    assert least_worst({}, 9, 9, ()) == [*range(9)]


def test_its_plan_knows_no_scale():
    _, _, influence, costs = traced(3, 12, longest=5)
    plans = {
        tuple(optimal_steps(of_velocity(costs, gram=size**2 * costs.gram, influence=unit * influence).table(), 5))
        for size in (1.0, 1e-3, 50.0) for unit in (1.0, -2.0)
    }  # fmt: skip
    assert len(plans) == 1 and of_velocity(costs).error([0, 3, 6, 9]) == costs.error([0, 3, 6, 9])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.data())
def test_lemica_has_the_least_worst_group_then_the_least_second_and_so_on(seed, total, data):
    budget, longest = data.draw(st.integers(1, total)), data.draw(st.integers(1, 7))
    forced = data.draw(st.lists(st.integers(0, total - 1), max_size=2))
    drawn = np.random.default_rng(seed).integers(1, 5, (total + 1, total + 1)).astype(float)  # with ties
    edges = {(j, k): drawn[j, k] for j in range(total) for k in range(j + 2, min(total, j + longest + 1) + 1)}
    every = list(allowed(total, budget, forced, longest))
    if not every:
        with pytest.raises(ValueError, match=f"{budget} computed steps are not possible in a run of {total}"):
            least_worst(edges, total, budget, forced)
        return

    def order(steps) -> list[float]:
        return sorted((edges.get((known[-1], end), 0.0) for known, end in spans(list(steps), total)), reverse=True)

    chosen = least_worst(edges, total, budget, forced)
    assert chosen in every and order(chosen) == min(map(order, every))


def drawn(steps: list[int] | None) -> torch.Tensor:
    """Finished latents of the two prompts of `planned`, of which all but some steps are computed."""
    call = {**tiny.arguments("sd15", STEPS), "prompt": ["a red cat", "a dog"], "negative_prompt": None}
    call["generator"] = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipe = tiny.make("sd15")
    cache = {"method": "static", "compute_steps": steps, "predictor": "adams_bashforth", "coordinate": "logsnr"}
    with fastdiff.accelerate(pipe, cache=None if steps is None else cache):
        return pipe(**call).images


def test_its_errors_are_those_of_runs_that_leave_out_one_group_each(monkeypatch):
    seen: list[dict] = []

    def kept(edges, *rest):
        seen.append(dict(edges))
        return least_worst(edges, *rest)

    monkeypatch.setattr("fastdiff.caching.methods.dp.least_worst", kept)
    monkeypatch.setattr("tests.caching.test_dp.STEPS", STEPS)
    made = planned("sd15", computed=3, objective="lemica", longest=2, cooldown_steps=1).cache.plan
    (edges,) = seen
    assert edges.keys() == {(0, 2), (0, 3), (1, 3), (1, 4), (2, 4)}
    plain = drawn(None)
    for step, end in ((0, 3), (2, 4)):
        apart = (drawn([k for k in range(STEPS) if not step < k < end]) - plain).abs().mean()
        assert edges[step, end] == pytest.approx(float(apart), rel=1e-4)
    assert list(made.compute) == least_worst(edges, STEPS, 3, (0, 4)) and made.error > 0


def test_what_it_cannot_measure_is_refused_with_what_to_do():
    for more in ({"ridge": 0.1}, {"fit_damping": True}):
        with pytest.raises(BadConfig, match="fit_damping or ridge takes others; leave them out, or set objective"):
            fastdiff.Config(cache={"method": "dp", "objective": "lemica", **more})
    config = fastdiff.Config(cache={"method": "dp", "computed_steps": 5, "objective": "lemica"})
    with pytest.raises(BadConfig, match="several share a run"):
        calibrate(two(), config, ["a red cat"], batch=1, **CALL)
