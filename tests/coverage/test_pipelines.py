"""One pipeline class after the other: exact when nothing is skipped, computing less when told to, and reversible."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.errors import UnsupportedModel
from fastdiff.pipelines.families import anatomies
from tests.zoo import ZOO

STEPS = 6
NEUTRAL = {
    "ab_cache": {"method": "ab_cache", "interval": 1},
    "deepcache": {"method": "deepcache", "interval": 1},
    "first_block": {"method": "first_block", "threshold": 0},
}
AGGRESSIVE = {
    "ab_cache": {"method": "ab_cache", "interval": 2, "warmup_steps": 1},
    "deepcache": {"method": "deepcache", "interval": 2},
    "first_block": {"method": "first_block", "threshold": 1e9},
}
COMPUTED = {"ab_cache": 3, "deepcache": 3, "first_block": 1}


def _case(name: str, method: str) -> Any:
    """What caches by structure is quick on every second pipeline, and a whole model's output on every eighth."""
    place = [*ZOO].index(name)
    quick = place % 8 == 0 or (place % 2 == 0 and method == (ZOO[name].method or method))
    return pytest.param(name, method, id=f"{name}-{method}", marks=() if quick else pytest.mark.slow)


CASES = [_case(name, method) for name, entry in ZOO.items() for method in ("ab_cache", entry.method) if method]
every_case = pytest.mark.parametrize(("name", "method"), CASES)


@cache
def plain(name: str, steps: int = STEPS) -> Tensor:
    return ZOO[name].run(ZOO[name].make(), steps)


def count_executions(pipe: Any, name: str) -> list[int]:
    """A list that grows by one each time the deepest layer truly runs; no method patches a leaf."""
    ran: list[int] = []
    ZOO[name].deepest_leaf(pipe).register_forward_hook(lambda *_: ran.append(1))
    return ran


@pytest.mark.parametrize("name", ZOO)
def test_with_nothing_enabled_the_result_is_identical(name):
    pipe = ZOO[name].make()
    ran = count_executions(pipe, name)
    handle = fastdiff.accelerate(pipe)
    assert torch.equal(ZOO[name].run(pipe, STEPS), plain(name))
    assert len(ran) == STEPS * ZOO[name].calls, "the layer that tells computed from cached steps runs once a call"
    assert (handle.report.steps, handle.report.cached) == (STEPS, 0)


@every_case
def test_settings_that_skip_nothing_change_nothing(name, method):
    pipe = ZOO[name].make()
    handle = fastdiff.accelerate(pipe, cache=NEUTRAL[method])
    assert torch.equal(ZOO[name].run(pipe, STEPS), plain(name))
    assert (handle.report.steps, handle.report.cached) == (STEPS, 0)


@every_case
def test_steps_are_really_skipped_and_reported(name, method):
    entry = ZOO[name]
    pipe = entry.make()
    ran = count_executions(pipe, name)
    handle = fastdiff.accelerate(pipe, cache=AGGRESSIVE[method])
    result = entry.run(pipe, STEPS)
    assert (handle.report.steps, handle.report.cached) == (STEPS, STEPS - COMPUTED[method])
    assert [row.count("computed") for row in handle.report.branches.values()] == [COMPUTED[method]] * entry.calls
    assert len(ran) == COMPUTED[method] * entry.calls
    assert result.shape == plain(name).shape and torch.isfinite(result).all()
    assert not torch.equal(result, plain(name))


@every_case
def test_a_second_call_with_other_steps_is_as_fresh_and_restore_gives_plain_results(name, method):
    entry = ZOO[name]
    used, fresh = entry.make(), entry.make()
    handle = fastdiff.accelerate(used, cache=AGGRESSIVE[method])
    fastdiff.accelerate(fresh, cache=AGGRESSIVE[method])
    entry.run(used, STEPS)
    assert torch.equal(entry.run(used, STEPS - 2), entry.run(fresh, STEPS - 2))
    handle.restore()
    assert torch.equal(entry.run(used, STEPS), plain(name))


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.method])
def test_a_stack_that_cannot_be_described_is_refused_not_guessed(name):
    with pytest.raises(UnsupportedModel, match="no stack of transformer blocks"):
        fastdiff.accelerate(ZOO[name].make(), cache="first_block")


def test_at_least_24_pipeline_classes():
    classes = {type(entry.make()) for entry in ZOO.values()}
    assert len(classes) >= 24, sorted(cls.__name__ for cls in classes)
    assert all(anatomy.recognised for entry in ZOO.values() for anatomy in anatomies(entry.make()))
