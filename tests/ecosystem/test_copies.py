"""A patched pipeline is not copied by accident: its copy would go on calling the patches of the original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.errors import NotCopyable
from tests import tiny
from tests.state import differences, snapshot

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda thing: torch.save(thing, io.BytesIO()),
}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))


def own() -> Any:
    """With a text encoder of its own: transformers leaves hooks that cannot be pickled on one that others share."""
    pipe = tiny.make("sd15")
    pipe.text_encoder = tiny.clip_encoder.__wrapped__()
    return pipe


@each_copy
@pytest.mark.parametrize("levers", [{}, {"cache": "ab_cache"}, {"cache": "deepcache"}, {"quant": "w8a8"}], ids=str)
def test_a_copy_of_what_is_patched_is_refused_with_the_remedy(levers, copied):
    pipe = own()
    before = snapshot(pipe)
    with fastdiff.accelerate(pipe, **levers) as handle:
        for thing in (pipe, pipe.unet, handle):
            with pytest.raises(NotCopyable, match=r"is accelerated and cannot be .*restore\(\) it first"):
                copied(thing)
    assert differences(before, snapshot(pipe)) == []
    copied(pipe), copied(pipe.unet)


def test_what_is_restored_can_be_pickled_and_the_copy_accelerated():
    pipe = own()
    handle = fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 2})
    expected = tiny.run(pipe, "sd15")
    handle.restore()
    twin = pickle.loads(pickle.dumps(pipe))
    fastdiff.accelerate(twin, cache={"method": "ab_cache", "interval": 2})
    assert torch.equal(tiny.run(twin, "sd15"), expected)
    assert torch.equal(tiny.run(pipe, "sd15"), tiny.run(tiny.make("sd15"), "sd15"))


def test_the_scheduler_alone_may_be_copied():
    """Solvers are copied by those who look ahead; the copy counts for no clock."""
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe)
    tiny.run(pipe, "sd15", steps=4)
    twin = copy.deepcopy(pipe.scheduler)
    twin.set_timesteps(3)
    assert handle.report.steps == 4 and type(twin) is type(pipe.scheduler)
    handle.restore()


@pytest.mark.parametrize("value", ["config", "report"])
def test_what_a_handle_says_can_be_pickled(value):
    pipe = tiny.make("sd15")
    with fastdiff.accelerate(pipe, cache="ab_cache") as handle:
        tiny.run(pipe, "sd15")
        said = getattr(handle, value)
        assert pickle.loads(pickle.dumps(said)) == said
