"""The dynamic program equals brute force, and its costs are the squared norms they stand for."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.caching.predictors import weights
from fastdiff.caching.schedule import Costs, fewest, optimal_steps, spans


def traced(seed: int, total: int, *, ridge: float | None = None, longest: int = 8, lebesgue_max: float = 6.0):
    """Outputs of a made-up run, the grid they lie on, the solver's factors, and the costs."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(total, 5)).cumsum(0)
    grid = np.sort(rng.uniform(0, 1000, total))[::-1]
    influence = rng.normal(size=total)

    def predict(at: int, known) -> list[float]:
        return weights("adams_bashforth", 2, lebesgue_max, grid[at], [grid[k] for k in known])

    return outputs, grid, influence, Costs(outputs @ outputs.T, predict, influence, ridge=ridge, longest=longest)


def cost_of(table, steps) -> float:
    """The sum of the group costs of a list of computed steps."""
    return sum(
        table[known[-1], known[-1] - known[-2] if len(known) > 1 else 0, end - known[-1]]
        for known, end in spans(list(steps), len(table))
    )


def allowed(total: int, budget: int, forced, longest: int):
    """Every list of computed steps that keeps the rules."""
    for rest in combinations(range(1, total), budget - 1):
        steps = [0, *rest]
        if set(forced) <= set(steps) and all(end - known[-1] - 1 <= longest for known, end in spans(steps, total)):
            yield steps


@st.composite
def problems(draw):
    total = draw(st.integers(1, 9))
    steps = st.integers(0, total - 1)
    return (
        draw(st.integers(0, 2**32 - 1)),
        total,
        draw(st.integers(1, total)),
        draw(st.lists(steps, max_size=3)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([None, 0.0, 0.1])),
    )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_chosen_steps_are_as_good_as_the_best_of_all(problem):
    seed, total, budget, forced, longest, ridge = problem
    table = traced(seed, total, ridge=ridge, longest=longest)[-1].table()
    every = list(allowed(total, budget, forced, longest))
    if not every:
        with pytest.raises(ValueError, match=f"{budget} computed steps are not possible"):
            optimal_steps(table, budget, forced)
        return
    chosen = optimal_steps(table, budget, forced)
    assert chosen in every
    best = min(cost_of(table, steps) for steps in every)
    assert cost_of(table, chosen) <= best + 1e-9 * (1 + best)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 4))
def test_groups_of_a_least_length_are_as_good_as_the_best_of_all(problem, shortest):
    """CacheQuant's bounds: a group is shorter only where a forced step or the end of the run cuts it."""
    seed, total, budget, forced, longest, ridge = problem
    table = traced(seed, total, ridge=ridge, longest=longest)[-1].table()
    every = [
        steps
        for steps in allowed(total, budget, forced, longest)
        if all(end - known[-1] >= shortest or end in (*forced, total) for known, end in spans(steps, total))
    ]
    if not every:
        with pytest.raises(ValueError, match=r"computed steps .*not possible"):
            optimal_steps(table, budget, forced, shortest=shortest)
        return
    chosen = optimal_steps(table, budget, forced, shortest=shortest)
    assert chosen in every
    best = min(cost_of(table, steps) for steps in every)
    assert cost_of(table, chosen) <= best + 1e-9 * (1 + best)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 3))
def test_minimax_has_the_least_worst_group_and_then_the_least_sum(problem, count):
    """Over all groups and all traced runs."""
    seed, total, budget, forced, longest, ridge = problem
    several = [traced(seed + k, total)[0] for k in range(count)]
    runs = np.stack([outputs @ outputs.T for outputs in several])
    costs = traced(seed, total, ridge=ridge, longest=longest)[-1]
    costs = Costs(runs.mean(0), costs.predict, costs.influence, ridge=ridge, longest=longest, runs=runs)
    every = list(allowed(total, budget, forced, longest))
    if not every:
        return
    table = costs.table()
    chosen = optimal_steps(table, budget, forced, minimax=True)

    def worst(steps) -> float:
        """By the definition: summed, weighted errors of each group in each run."""
        found = 0.0
        for known, end in spans(list(steps), total):
            pairs = [(at, costs.weights(at, known[-2:])) for at in range(known[-1] + 1, end)]
            for outputs in several:
                shift = sum(
                    costs.influence[at] * (sum(f * outputs[k] for k, f in own) - outputs[at]) for at, own in pairs
                )
                found = max(found, float(np.sum(np.square(shift))))
        return found

    least = min(map(worst, every))
    assert chosen in every and worst(chosen) <= least * (1 + 1e-9) + 1e-12
    ties = [cost_of(table, steps) for steps in every if worst(steps) <= least * (1 + 1e-9) + 1e-12]
    assert cost_of(table, chosen) <= min(ties) * (1 + 1e-9) + 1e-9
    assert costs.peak(chosen) <= worst(chosen) * (1 + 1e-9) + 1e-9 or len(chosen) > 2


def test_minimax_spreads_an_error_that_the_sum_puts_in_one_place():
    """Groups cost 0, 0 and 9, or 5 and 5 and 0: the sum takes the first, minimax others."""
    table = np.full((6, 4, 4), 5.0)
    table[0, 0, 2], table[2, 2, 2] = 0.0, 0.0
    table[4, 2, 2] = 9.0
    assert optimal_steps(table, 3) == [0, 2, 4]
    assert max(cost for cost in _groups(table, optimal_steps(table, 3, minimax=True))) == 5.0


def _groups(table, steps):
    for known, end in spans(steps, len(table)):
        yield table[known[-1], known[-1] - known[-2] if len(known) > 1 else 0, end - known[-1]]


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 8), max_size=3))
@settings(max_examples=100, deadline=None)
def test_the_fewest_steps_that_keep_the_rules(total, longest, forced):
    forced = [step for step in forced if step < total]
    least = fewest(total, longest, forced)
    assert any(allowed(total, least, forced, longest))
    assert least == 1 or not any(allowed(total, least - 1, forced, longest))


@pytest.mark.parametrize("ridge", [None, 0.0, 0.3])
def test_a_group_costs_what_it_does_to_the_sum(ridge):
    outputs, _, influence, costs = traced(3, 8, ridge=ridge)
    for known, end in [([0], 4), ([1, 2], 6), ([0, 3], 8), ([4, 5], 6)]:
        shift = np.zeros(outputs.shape[1])
        for at in range(known[-1] + 1, end):
            predicted = sum(factor * outputs[step] for step, factor in costs.weights(at, known))
            shift += influence[at] * (predicted - outputs[at])
        a = known[-1] - known[0]
        assert costs.table()[known[-1], a, end - known[-1]] == pytest.approx(shift @ shift, rel=1e-9, abs=1e-9)


def test_the_error_is_relative_to_what_the_outputs_add_up_to():
    outputs, _, influence, costs = traced(4, 6)
    whole = np.linalg.norm(influence @ outputs)
    assert costs.error([0, 1, 2, 3, 4, 5]) == 0
    assert costs.error([0, 2, 3]) == pytest.approx(np.sqrt(cost_of(costs.table(), [0, 2, 3])) / whole)


def test_what_the_predictor_makes_exactly_costs_nothing():
    """Outputs on a straight line: two computed steps are enough."""
    outputs, grid, influence, _ = traced(5, 8)
    line = np.outer(grid, outputs[0]) + outputs[1]
    costs = Costs(line @ line.T, lambda at, known: weights("adams_bashforth", 2, 1e9, grid[at], grid[known]), influence)
    steps = optimal_steps(costs.table(), 2)
    assert costs.error(steps) < 1e-6


def test_a_fit_is_the_least_squares_one_and_a_strong_pull_gives_the_predictors_weights():
    outputs, _, _, free = traced(6, 8, ridge=0.0, lebesgue_max=1e9)
    (_, w0), (_, w1) = free.weights(5, [1, 3])
    best = np.linalg.lstsq(outputs[[1, 3]].T, outputs[5], rcond=None)[0]
    assert (w0, w1) == pytest.approx(tuple(best), rel=1e-6)
    pulled, plain = (traced(6, 8, ridge=ridge, lebesgue_max=1e9)[-1] for ridge in (1e9, None))
    assert np.allclose(pulled.weights(5, [1, 3]), plain.weights(5, [1, 3]), rtol=1e-6)


def test_a_fitted_damping_is_never_further_off_than_reuse_or_the_predictor():
    outputs, _, _, plain = traced(6, 8, lebesgue_max=1e9)
    fitted = Costs(plain.gram, plain.predict, damp=True)
    reuse = Costs(plain.gram, lambda at, known: [1.0])
    for at, known in [(5, [1, 3]), (2, [0, 1]), (7, [2, 6])]:
        errors = [
            np.linalg.norm(sum(f * outputs[k] for k, f in costs.weights(at, known)) - outputs[at])
            for costs in (fitted, reuse, plain)
        ]
        assert errors[0] <= min(errors[1:]) + 1e-12
    known, part = [0, 1], fitted.weights(3, [0, 1])
    ridged = Costs(plain.gram, plain.predict, damp=True, ridge=1e9).weights(3, known)
    assert len(part) == 2 and np.allclose(ridged, part, rtol=1e-6), "a ridge pulls to the damped weights"


def test_a_predictor_of_lower_order_uses_the_newest_value_alone():
    costs = Costs(np.eye(4), lambda at, known: [1.0])
    assert costs.weights(3, [0, 1]) == ((1, 1.0),)
    assert costs.table()[1, 1, 2] == pytest.approx(2.0)


@pytest.mark.parametrize("total", [50, 100])
def test_a_long_run_is_planned_in_moments(total):
    costs = traced(7, total)[-1]
    began = time.perf_counter()
    steps = optimal_steps(costs.table(), total // 3)
    assert len(steps) == total // 3 and time.perf_counter() - began < 10  # takes a third of a second on a busy core
