"""Law 8: predictors are exact for polynomials of their degree on any grid; guards hold for any mask and any probe."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.caching.base import CacheMethod, every
from fastdiff.caching.methods.ab_cache import ABCache
from fastdiff.caching.methods.deepcache import DeepCache
from fastdiff.caching.methods.first_block import FirstBlock
from fastdiff.caching.methods.static import Static
from fastdiff.caching.predictors import PREDICTORS, combine, weights
from fastdiff.caching.predictors.damped import best_share, damped
from fastdiff.caching.predictors.polynomial import adams_bashforth
from fastdiff.caching.predictors.spectrum import spectrum
from fastdiff.caching.region import Memory, Region
from fastdiff.clock import Run, Step
from fastdiff.errors import BadConfig
from tests import tiny

DEGREE = {
    "reuse": lambda order: 0,
    "adams_bashforth": lambda order: order - 1,
    "taylor": lambda order: order - 1,
    "halfway": lambda order: 0,
    "spectrum": lambda order: min(order - 1, 1),
}
gaps = st.lists(st.floats(0.2, 5), min_size=2, max_size=9)
coefficients = st.lists(st.floats(-3, 3), min_size=6, max_size=6)


def run_of(total: int, flow: bool = False) -> Run:
    sigmas = tuple(1 - i / total for i in range(total))
    return Run(1, tuple(1000 * s for s in sigmas), sigmas, flow)


def test_every_predictor_has_a_degree_here():
    assert DEGREE.keys() == PREDICTORS.keys()


@given(st.sampled_from(sorted(PREDICTORS)), st.integers(1, 6), gaps, coefficients, st.floats(0.1, 3))
def test_a_predictor_reproduces_polynomials_of_its_degree_on_any_grid(name, order, steps, factors, ahead):
    anchors = [math.fsum(steps[: i + 1]) for i in range(len(steps))]
    at = anchors[-1] + ahead
    found = weights(name, order, math.inf, at, anchors)
    degree = DEGREE[name](len(found))

    def polynomial(x: float) -> float:
        return math.fsum(c * ((x - at) / (at - anchors[0])) ** k for k, c in enumerate(factors[: degree + 1]))

    assert len(found) == min(order, len(anchors))
    predicted = math.fsum(w * polynomial(x) for w, x in zip(found, anchors[-len(found) :], strict=True))
    scale = 1 + math.fsum(abs(w) for w in found)
    assert abs(predicted - polynomial(at)) <= 1e-6 * scale
    assert math.isclose(math.fsum(found), 1, rel_tol=1e-9 * scale), "a constant stays what it is"


@given(st.integers(2, 6), gaps)
def test_a_predictor_is_not_exact_beyond_its_degree(order, steps):
    """So that the test above is known to tell orders apart."""
    anchors = [math.fsum(steps[: i + 1]) for i in range(len(steps))]
    found = weights("adams_bashforth", order, math.inf, anchors[-1] + 1, anchors)
    known = anchors[-len(found) :]
    predicted = math.fsum(w * (x - known[0]) ** len(found) for w, x in zip(found, known, strict=True))
    truth = (anchors[-1] + 1 - known[0]) ** len(found)
    error = math.prod(anchors[-1] + 1 - x for x in known)  # of the leading term, exactly
    assert math.isclose(truth - predicted, error, rel_tol=1e-6)


many = st.lists(st.floats(0.2, 5), min_size=3, max_size=6)


def grid_of(steps: list[float], ahead: float) -> tuple[list[float], float]:
    anchors = [math.fsum(steps[: i + 1]) for i in range(len(steps))]
    return anchors, anchors[-1] + ahead


@given(many, st.floats(0.1, 3), st.floats(0, 1e3))
def test_spectrum_reproduces_constants_and_lines_whatever_its_ridge(steps, ahead, ridge):
    """The authors' ridge pulls the constant, too: on their own grid the weights add up to 0.73 to 0.94."""
    anchors, at = grid_of(steps, ahead)
    found = spectrum(at, anchors, ridge=ridge)
    scale = math.fsum(map(abs, found))
    assert abs(math.fsum(found) - 1) <= 1e-11 * scale
    assert abs(math.fsum(w * x for w, x in zip(found, anchors, strict=True)) - at) <= 1e-11 * scale * at


@given(st.lists(st.floats(0.2, 5), min_size=2, max_size=5), st.floats(0.1, 3))
def test_spectrum_without_a_ridge_is_lagranges_polynomial_where_it_has_as_many_coefficients(steps, ahead):
    anchors, at = grid_of(steps, ahead)
    wanted = adams_bashforth(at, anchors)
    assert np.allclose(spectrum(at, anchors, len(anchors) - 1, 0.0), wanted, rtol=0, atol=1e-9 * sum(map(abs, wanted)))


@given(many, st.floats(0.1, 3))
def test_spectrum_becomes_the_least_squares_line_as_its_ridge_grows(steps, ahead):
    anchors, at = grid_of(steps, ahead)
    mean = math.fsum(anchors) / len(anchors)
    spread = math.fsum((x - mean) ** 2 for x in anchors)
    line = [1 / len(anchors) + (at - mean) * (x - mean) / spread for x in anchors]
    # what is left of the higher terms goes down as the ridge goes up; where anchors lie close together it is large
    apart, nearer = (np.abs(np.subtract(spectrum(at, anchors, ridge=ridge), line)).max() for ridge in (1e6, 1e9))
    assert nearer <= 1.01e-3 * apart + 1e-9 * np.abs(line).max()


@given(many, st.floats(0.1, 3), st.sampled_from([-1.0, -1000.0, 0.01]), st.floats(-50, 50))
def test_spectrum_knows_no_direction_and_no_unit_of_the_axis(steps, ahead, factor, shift):
    anchors, at = grid_of(steps, ahead)
    moved = spectrum(factor * at + shift, [factor * x + shift for x in anchors])
    assert np.allclose(moved, spectrum(at, anchors), rtol=0, atol=1e-8)


@given(many, st.floats(0.1, 3), st.floats(1e-3, 10))
def test_spectrum_balances_what_noise_and_what_bends_do_to_the_forecast(steps, ahead, ridge):
    """Its weights are those of least |w|^2 + sum_(k > 1) (sum_j w_j T_k(s_j) - T_k(s))^2 / ridge that are exact for
    lines (Woodbury); so they amplify noise no more than any that are exact for all of T_0 to T_M."""
    anchors, at = grid_of(steps, ahead)
    found = np.asarray(spectrum(at, anchors, ridge=ridge))
    places = 2 * (np.asarray([*anchors, at]) - anchors[0]) / (at - anchors[0]) - 1
    basis = np.cos(np.outer(np.arccos(np.clip(places, -1, 1)), np.arange(min(5, len(anchors)))))  # T_k(cos x) = cos kx
    gradient = found + basis[:-1, 2:] @ (found @ basis[:-1, 2:] - basis[-1, 2:]) / ridge
    free = np.linalg.svd(basis[:-1, :2].T)[2][2:]  # directions that keep lines exact
    assert np.abs(free @ gradient).max(initial=0) <= 1e-6 * (1 + np.abs(found).sum()) / min(1, ridge)
    exact = np.linalg.pinv(basis[:-1].T) @ basis[-1]
    assert np.linalg.norm(found) <= np.linalg.norm(exact) * (1 + 1e-9)


@given(st.sampled_from(sorted(PREDICTORS)), st.integers(1, 6), gaps, st.floats(0, 1), st.floats(0.1, 3))
def test_damping_takes_its_share_of_the_forecast_change(name, order, steps, share, ahead):
    anchors, at = grid_of(steps, ahead)
    whole = weights(name, order, math.inf, at, anchors)
    found = weights(name, order, math.inf, at, anchors, share)
    values = np.sin(anchors[-len(found) :])
    scale = sum(map(abs, whole))
    taken, change = found @ values - values[-1], whole @ values - values[-1]
    assert math.isclose(taken, share * change, rel_tol=0, abs_tol=1e-12 * scale)
    assert weights(name, order, math.inf, at, anchors, 1.0) == whole, "to the bit"
    assert weights(name, order, math.inf, at, anchors, 0.0) == [0.0] * (len(found) - 1) + [1.0], "reuse, to the bit"


def test_halfway_is_a_damping_of_a_half():
    assert weights("adams_bashforth", 3, 6, 4.5, [0, 1, 3], 0.5) == weights("halfway", 3, 6, 4.5, [0, 1, 3])


@given(many, st.floats(0.1, 3), st.sampled_from([-1.0, 1.0]))
def test_the_best_share_of_a_line_is_all_of_it(steps, ahead, direction):
    anchors, at = grid_of([direction * step for step in steps], direction * ahead)
    values = np.outer([*anchors, at], [1.0, -2.0]) + np.array([3.0, 0.5])
    gram = values @ values.T
    for factors in (adams_bashforth(at, anchors), spectrum(at, anchors)):
        assert best_share(gram[:-1, :-1], gram[:-1, -1], factors) == pytest.approx(1, abs=1e-6)


@given(st.floats(0.1, 5), st.floats(0, 20), st.floats(0.1, 4))
def test_the_best_share_of_a_noisy_line_is_the_closed_form(change, noise, gaps_ahead):
    """Two anchors a gap apart on a line, each with noise of energy v, k gaps ahead, true change of energy D:
    e = change - n_a, p = change + k (n_a - n_b), so <e, p> = D - k v and |p|^2 = D + 2 k^2 v in the mean."""
    slope = change / gaps_ahead**2  # energy of the change in one gap
    block = np.array([[slope + noise, 0.0], [0.0, noise]])  # the newest anchor lies in the origin, but for its noise
    wanted = np.array([-gaps_ahead * slope, 0.0])
    expected = (change - gaps_ahead * noise) / (change + 2 * gaps_ahead**2 * noise)
    found = best_share(block, wanted, [-gaps_ahead, 1 + gaps_ahead])
    assert found == pytest.approx(max(0.0, expected), rel=1e-9, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_no_other_share_is_nearer_to_the_truth(seed, count):
    values = np.random.default_rng(seed).normal(size=(count + 1, 7))
    gram, factors = values @ values.T, np.random.default_rng(seed + 1).normal(size=count).tolist()
    share = best_share(gram[:-1, :-1], gram[:-1, -1], factors)

    def error(g: float) -> float:
        return float(np.linalg.norm(damped(factors, g) @ values[:-1] - values[-1]))

    assert 0 <= share <= 1
    assert all(error(share) <= error(g) + 1e-9 for g in np.linspace(0, 1, 21))


def test_no_forecast_change_is_no_damping():
    values = np.ones((3, 4))
    gram = values @ values.T
    assert best_share(gram[:2, :2], gram[:2, 2], [-1.0, 2.0]) == 0.0


@given(st.integers(1, 6), gaps, st.floats(0.1, 20), st.floats(1, 10))
def test_the_lebesgue_guard_drops_the_order_no_further_than_needed(order, steps, ahead, bound):
    anchors = [math.fsum(steps[: i + 1]) for i in range(len(steps))]
    at = anchors[-1] + ahead
    found = weights("adams_bashforth", order, bound, at, anchors)
    assert sum(map(abs, found)) <= bound or len(found) == 1
    if len(found) < min(order, len(anchors)):
        assert sum(map(abs, weights("adams_bashforth", len(found) + 1, math.inf, at, anchors))) > bound


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_combining_is_the_weighted_sum_of_the_newest_values_in_float32(factors):
    assume(any(factors))
    values = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    expected = sum(f * v.double() for f, v in zip(factors, values[-len(factors) :], strict=True))
    assert torch.allclose(combine(factors, values).double(), expected, atol=1e-5)


def test_combining_half_precision_values_does_not_round_in_between():
    values = [torch.full((4,), v, dtype=torch.float16) for v in (2048.0, 2048.0, 2050.0)]
    assert combine([1.0, -3.0, 3.0], values).tolist() == [2054.0] * 4  # 3 * 2050 is no float16
    assert combine([1.0], values).dtype == torch.float16


ANYWHERE = Region("anywhere", ())
METHODS = {
    "every": lambda guards, interval: DeepCache(interval=interval, **guards),
    "after warm-up": lambda guards, interval: ABCache(interval=interval, **guards),
    "listed": lambda guards, interval: Static(compute_steps=(0,), **guards),
}
guards = st.fixed_dictionaries(
    {"warmup_steps": st.integers(0, 12), "cooldown_steps": st.integers(0, 12)},
    optional={"max_consecutive_cached": st.integers(1, 6), "max_cached_steps": st.integers(0, 12)},
)


def longest_cached(mask: list[bool]) -> int:
    return max(map(len, "".join("x" if computed else "." for computed in mask).split("x")))


def check_guards(mask: list[bool], method: CacheMethod) -> None:
    total = len(mask)
    assert mask[0], "there is nothing to predict the first step from"
    assert all(mask[: method.warmup_steps])
    assert all(mask[max(0, total - method.cooldown_steps) :])
    if method.max_consecutive_cached is not None:
        assert longest_cached(mask) <= method.max_consecutive_cached
    if method.max_cached_steps is not None:
        assert mask.count(False) <= method.max_cached_steps


@given(st.sampled_from(sorted(METHODS)), guards, st.integers(1, 9), st.integers(1, 60))
def test_masks_obey_the_guards(kind, settings, interval, total):
    method = METHODS[kind](settings, interval)
    mask = method.guarded_mask(run_of(total), ANYWHERE)
    assert len(mask) == total
    check_guards(mask, method)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 60))
def test_an_interval_mask_is_the_warm_up_and_then_every_nth(interval, warmup, total):
    mask = every(interval, run_of(total), warmup)
    assert all(mask[:warmup]) and (interval > 1 or all(mask))
    computed = [i for i, wanted in enumerate(mask) if wanted][max(0, warmup - 1) :]
    assert all(b - a == interval for a, b in pairwise(computed))
    assert not computed or total - computed[-1] <= interval


@given(st.sets(st.integers(0, 19), min_size=1), st.integers(20, 90))
def test_a_list_for_another_number_of_steps_keeps_its_fractions(steps, total):
    method = Static(compute_steps=tuple(steps), of_steps=20)
    assert [i for i, c in enumerate(method.mask(run_of(20), ANYWHERE)) if c] == sorted(steps)
    stretched = [i for i, c in enumerate(method.mask(run_of(total), ANYWHERE)) if c]
    assert len(stretched) == len(steps), "no step is lost in a longer run"
    pairs = zip(sorted(steps), stretched, strict=True)
    assert all(abs(s / 19 - i / (total - 1)) <= 0.5 / (total - 1) + 1e-9 for s, i in pairs)


def test_a_list_beyond_the_run_is_refused_with_the_numbers():
    with pytest.raises(BadConfig, match="compute_steps holds 9, but the run has steps 0 to 5"):
        Static(compute_steps=(0, 9)).mask(run_of(6), ANYWHERE)


@settings(max_examples=12, deadline=None)
@given(guards, st.sampled_from([0.0, 0.05, 1e9]))
def test_dynamic_decisions_obey_the_guards(chosen, threshold):
    pipe = tiny.make("pixart")
    method = FirstBlock(threshold=threshold, **chosen)
    handle = fastdiff.accelerate(pipe, cache=method)
    tiny.run(pipe, "pixart", steps=12)
    mask = [state == "computed" for state in handle.report.branches[0]]
    check_guards(mask, method)
    if threshold == 0:
        assert all(mask)
    if threshold == 1e9:
        assert mask == FirstBlock.guarded_mask(_Wishes(**method.model_dump(exclude={"method"})), run_of(12), ANYWHERE)


class _Wishes(FirstBlock):
    """Wishes to skip everything, as a static method."""

    def mask(self, run: Run, region: Region) -> list[bool]:
        return [False] * run.total


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("lagged", [False, True])
def test_a_change_that_is_not_a_number_is_computed(monkeypatch, broken, lagged):
    def change(self, step: Step, memory: Memory) -> torch.Tensor:
        return torch.tensor(broken if step.index in (2, 3) else 0.0)

    monkeypatch.setattr(FirstBlock, "change", change)
    pipe = tiny.make("pixart")
    handle = fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1e30, "lagged": lagged})
    tiny.run(pipe, "pixart", steps=6)
    mask = [state == "computed" for state in handle.report.branches[0]]
    # lagged: known one step later; the look at step 4 finds nothing from before it, as step 3 was computed
    assert mask == [True, False, lagged is False, True, False, False]


def test_a_change_from_nothing_is_as_large_as_can_be():
    tiny_memory = Memory(probe=torch.ones(3), probes=[torch.zeros(3)])
    assert FirstBlock().change(Step(run_of(3), 1, 0), tiny_memory) > 1e30
