"""Levels, theory, weights and grids: what must hold exactly."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from fastdiff.pipelines.solving.fit import Products, fitted, solve
from fastdiff.pipelines.solving.grid import best, costs
from fastdiff.pipelines.solving.levels import Levels, blend, put
from fastdiff.pipelines.solving.theory import flow_step
from tests.tiny import make

double = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=double)


def products(pictures=6, parts=4, values=50, noise=0.1, seed=0):
    """Pictures that are the same sum of their parts, but for noise; and that sum."""
    rows, true = random(parts, pictures, values, seed=seed), random(parts, seed=seed + 1)
    wanted = torch.einsum("k,ksn->sn", true, rows) + noise * random(pictures, values, seed=seed + 2)
    return Products.of([*rows], wanted), true


def test_without_noise_the_weights_are_found():
    found, true = products(noise=0.0)
    assert torch.allclose(solve(found, torch.zeros(4, dtype=double), 1e-12), true, atol=1e-6)
    assert found.error(true).max() < 1e-12


def test_the_error_is_the_mean_square_of_what_is_left():
    rows, wanted = random(3, 5, 7), random(5, 7, seed=9)
    weights = random(3, seed=4)
    left = wanted - torch.einsum("k,ksn->sn", weights, rows)
    assert torch.allclose(Products.of([*rows], wanted).error(weights), left.square().mean(1))


def test_a_large_ridge_is_the_prior_and_nothing_to_mend_leaves_it():
    found, _ = products()
    prior = random(4, seed=7)
    assert torch.allclose(solve(found, prior, 1e12), prior, atol=1e-6)
    nothing = Products(found.gram, torch.zeros_like(found.cross), torch.zeros_like(found.rest))
    assert torch.equal(fitted(nothing, nothing, torch.zeros(4, dtype=double), (1e-3,)), torch.zeros(4, dtype=double))


def test_order_and_number_of_pictures_do_not_matter():
    found, _ = products()
    prior = torch.zeros(4, dtype=double)
    once = solve(found, prior, 1e-4)
    assert torch.allclose(solve(found.at(torch.tensor([3, 1, 5, 0, 2, 4])), prior, 1e-4), once)
    assert torch.allclose(solve(Products.cat([found, found]), prior, 1e-4), once)


def test_a_picture_that_went_elsewhere_moves_the_weights_little():
    good, true = products(pictures=15, noise=0.01)
    lost, _ = products(pictures=1, noise=30.0, seed=50)
    prior = torch.zeros(4, dtype=double)
    spoilt = solve(Products.cat([good, lost]), prior, 1e-9)
    assert (spoilt - true).abs().max() < 0.02
    both = Products.cat([good, lost])  # plain least squares, for comparison
    plain = torch.linalg.solve(both.gram.sum(0), both.cross.sum(0))
    assert (plain - true).abs().max() > 10 * (spoilt - true).abs().max()


def test_held_out_pictures_choose_the_prior_over_a_bad_fit():
    fit, _ = products(pictures=2, values=3, noise=5.0)
    held, true = products(pictures=8, noise=0.0, seed=20)
    assert torch.equal(fitted(fit, held, true, (1e-3, 1e-6)), true)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_levels_are_those_of_the_scheduler(name):
    from fastdiff.pipelines.solving.schedulers import host

    scheduler = host(make(name).scheduler)
    scheduler.set_timesteps(7)
    levels = Levels.of(scheduler)
    sigmas = levels.sigmas([0.0, 0.3, 0.9, 1.0])
    assert all(np.diff(sigmas) < 0) and sigmas[-1] == pytest.approx(float(scheduler.sigmas[-1]))
    times = levels.timesteps([0.0, 0.3, 0.9])
    if levels.flow:
        assert sigmas[0] == 1 and times == pytest.approx(sigmas[:3] * 1000)
        assert sigmas[1] == pytest.approx(3 * 0.7 / (1 + 2 * 0.7))  # SD3's shift of 3
    else:
        whole = [round(t) for t in times]
        known = (1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod
        assert sigmas[:3] == pytest.approx([float(known[t].sqrt()) for t in whole], rel=2e-3)
    for signal, noise in levels.signal_and_noise([0.3, 0.9]):
        assert signal + noise == pytest.approx(1) if levels.flow else signal**2 + noise**2 == pytest.approx(1)
    put(scheduler, [0.0, 0.3, 0.9, 1.0])
    assert scheduler.num_inference_steps == 3 and scheduler.timesteps.tolist() == pytest.approx([*times])


def test_another_resolution_moves_the_levels_as_its_shift_does():
    scheduler = make("flux").scheduler
    scheduler.register_to_config(use_dynamic_shifting=True)
    near, far = (Levels.of(scheduler, mu).sigmas([0.5])[0] for mu in (0.5, 1.15))
    assert near == pytest.approx(math.exp(0.5) / (1 + math.exp(0.5)))
    assert far == pytest.approx(math.exp(1.15) / (1 + math.exp(1.15)))


def test_theory_is_exact_for_a_picture_that_is_a_line_in_log_snr():
    """x' of the probability flow where the data prediction is a + b lambda: integrated numerically, finely."""
    levels, a, b = (0.6, 0.8), 0.7, -0.3

    def line(sigma):
        return a + b * math.log((1 - sigma) / sigma)

    def to(x, start, end, steps=4000):
        grid = np.linspace(start, end, steps + 1)
        for s, t in pairwise(grid):
            middle = (s + t) / 2
            slope = (x - line(s)) / s
            x += (t - s) * ((x + (t - s) / 2 * slope) - line(middle)) / middle
        return x

    old, x = 0.35, to(0.35, levels[1], levels[0])
    f = [(value - line(sigma)) / sigma for value, sigma in ((x, levels[0]), (old, levels[1]))]
    weights = flow_step(levels, 0.3)
    assert float(weights @ torch.tensor([*f, x, old], dtype=double)) == pytest.approx(to(x, levels[0], 0.3), abs=1e-6)


@pytest.mark.parametrize("following", [0.4, 0.0])
def test_theory_keeps_a_constant_picture(following):
    x0, noise = 0.7, -1.3
    states = [(1 - s) * x0 + s * noise for s in (0.6, 0.8)]
    weights = flow_step((0.6, 0.8), following)
    made = float(weights @ torch.tensor([noise - x0, noise - x0, *states], dtype=double))
    assert made == pytest.approx((1 - following) * x0 + following * noise)


def trajectories(points=9, pictures=4, values=30, seed=3):
    """States and outputs of a smooth flow along some points, and their mean products."""
    time = torch.linspace(0, 1, points, dtype=double)[:, None, None]
    base = random(4, pictures, values, seed=seed)
    states = base[0] * time + base[1] * (3 * time).sin() + base[2] * (1 - time) ** 2 + base[3] * 0.1 * (9 * time).cos()
    states = states + 0.05 * random(points, pictures, values, seed=seed + 1)
    outputs = (base[0] + 3 * base[1] * (3 * time).cos() - 2 * base[2] * (1 - time))[:-1]
    rows = torch.cat([states, outputs]).permute(1, 0, 2)
    return states, outputs, (rows @ rows.transpose(1, 2)).mean(0).numpy() / values


def test_costs_are_what_least_squares_leaves():
    states, outputs, gram = trajectories()
    cost = costs(gram)
    parts = torch.stack([outputs[4], outputs[2], states[4], states[2]]).flatten(1)
    weights = torch.linalg.lstsq(parts.T, states[7].flatten()[:, None]).solution
    left = (parts.T @ weights - states[7].flatten()[:, None]).square().mean()
    assert cost[2, 4, 7] == pytest.approx(float(left), rel=1e-3)
    assert np.isinf(cost[4, 2, 7]) and np.isinf(cost[2, 4, 4]) and np.isfinite(cost[0, 0, 3])


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 8])
def test_the_grid_is_that_of_brute_force(evaluations):
    cost = costs(trajectories()[2])

    def total(path):
        return cost[0, 0, path[1]] + sum(cost[a, b, j] for a, b, j in zip(path, path[1:], path[2:], strict=False))

    paths = [(0, *inner, 8) for inner in combinations(range(1, 8), evaluations - 1)]
    assert tuple(best(cost, evaluations)) == min(paths, key=total)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_teachers_places_are_fine_at_both_ends(name):
    from fastdiff.pipelines.solving.schedulers import host

    scheduler = host(make(name).scheduler)
    scheduler.set_timesteps(7)
    places = blend(Levels.of(scheduler), 40)
    gaps = np.diff(places)
    assert (places[0], places[-1], len(places)) == (0, 1, 41) and min(gaps) > 0
    assert gaps[-1] < 0.5 * max(gaps) and gaps[0] < max(gaps)
