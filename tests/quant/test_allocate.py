"""Bits by layer: the dynamic program against every choice there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fastdiff.errors import BadConfig
from fastdiff.quant import allocate as module
from fastdiff.quant.allocate import allocate


def problem(seed: int, layers: int = 5, choices: tuple[int, ...] = (4, 8, 16), grain: int = 1):
    """Errors that fall and sizes that rise with the bits, but for some layers that break the rule."""
    rng = np.random.default_rng(seed)
    errors, sizes = {}, {}
    for k in range(layers):
        falling = np.sort(rng.exponential(size=len(choices)))[::-1]
        if rng.random() < 0.2:
            rng.shuffle(falling)
        errors[f"layer{k}"] = dict(zip(choices, map(float, falling), strict=True))
        grown = np.sort(rng.integers(1, 60, len(choices))) * grain
        sizes[f"layer{k}"] = dict(zip(choices, map(int, grown), strict=True))
    return errors, sizes


def every(errors, sizes):
    """(bytes, error) of each combination."""
    names = list(errors)
    for bits in product(*(errors[name] for name in names)):
        chosen = list(zip(names, bits, strict=True))
        yield sum(sizes[n][b] for n, b in chosen), sum(errors[n][b] for n, b in chosen)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("grain", [1, 64])
def test_a_budget_is_used_as_well_as_by_brute_force(seed, grain):
    errors, sizes = problem(seed, grain=grain)
    known = list(every(errors, sizes))
    smallest, largest = min(size for size, _ in known), max(size for size, _ in known)
    for budget in np.linspace(smallest, largest + 10, 7).astype(int):
        found = allocate(errors, sizes, budget=int(budget))
        least = min(error for size, error in known if size <= budget)
        assert found.error == pytest.approx(least, rel=1e-12)
        assert found.bytes <= budget
        assert found.bytes == sum(sizes[name][bits] for name, bits in found.bits.items())
        assert found.bytes == min(size for size, error in known if size <= budget and error <= least * (1 + 1e-12))


@pytest.mark.parametrize("seed", range(10))
def test_a_target_takes_as_few_bytes_as_by_brute_force(seed):
    errors, sizes = problem(seed)
    known = list(every(errors, sizes))
    low, high = min(error for _, error in known), max(error for _, error in known)
    for target in np.linspace(low * (1 + 1e-9), high, 6):
        found = allocate(errors, sizes, target=float(target))
        assert found.error <= target * (1 + 1e-9)
        assert found.bytes == min(size for size, error in known if error <= target * (1 + 1e-12))


def test_a_budget_that_is_too_small_names_the_smallest():
    errors, sizes = problem(0, grain=100_000)
    smallest = min(size for size, _ in every(errors, sizes))
    with pytest.raises(BadConfig, match=rf"the smallest is {smallest / 1e6:.4g} MB"):
        allocate(errors, sizes, budget=smallest - 1)
    assert allocate(errors, sizes, budget=smallest).bytes == smallest


def test_a_target_that_is_too_small_names_the_least_error():
    errors, sizes = problem(0)
    least = min(error for _, error in every(errors, sizes))
    with pytest.raises(BadConfig, match=f"the least is {least:g}"):
        allocate(errors, sizes, target=least / 2)


def test_a_model_of_many_bytes_is_counted_coarsely_within_the_budget(monkeypatch):
    errors, sizes = problem(3, layers=6, grain=1)
    known = list(every(errors, sizes))
    monkeypatch.setattr(module, "_WIDEST", 40)
    for budget in (120, 170, 230):
        if budget < min(size for size, _ in known):
            continue
        found = allocate(errors, sizes, budget=budget)
        assert found.bytes <= budget
        tighter = budget - 6 * 9  # each layer's bytes are rounded up to the unit
        reachable = [error for size, error in known if size <= tighter]
        assert not reachable or found.error <= min(reachable) * (1 + 1e-12)


def test_hundreds_of_layers_take_a_moment():
    errors, sizes = problem(1, layers=800, grain=997)
    middle = sum(choices[8] for choices in sizes.values())
    found = allocate(errors, sizes, budget=middle)
    assert found.bytes <= middle
    assert found.error <= sum(choices[8] for choices in errors.values()), "no worse than 8 bits everywhere"
