# ruff: noqa: E721, some pipelines compare types
"""A scheduler that is listened to is, to everybody else, the object that it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.listening import listen, unheard, unlisten
from tests import tiny


def heard(scheduler: Any) -> tuple[list[str], Any]:
    """Names of the methods that were called, and what listens."""
    names: list[str] = []

    def told(_scheduler: Any, name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return method(*args, **kwargs)

    listen(scheduler, told)
    return names, told


def test_it_looks_like_itself():
    plain = diffusers.EulerDiscreteScheduler()
    kind, state = type(plain), dict(vars(plain))
    names, told = heard(plain)
    assert type(plain) == kind and plain.__class__ is kind and isinstance(plain, kind) and vars(plain) == state
    assert type(plain) in {kind} and type(plain) != diffusers.DDIMScheduler  # as Bria asks
    assert type(plain.from_config(plain.config)) is kind, "what it makes is listened to by nobody"
    plain.set_timesteps(3)
    unlisten(plain, told)
    plain.set_timesteps(4)
    assert type(plain) is kind and names == ["set_timesteps"]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), unheard])
def test_a_copy_has_a_state_of_its_own(how):
    scheduler = diffusers.EulerDiscreteScheduler()
    heard(scheduler)
    scheduler.set_timesteps(5)
    other = how(scheduler)
    other.set_timesteps(3)
    assert (len(scheduler.timesteps), len(other.timesteps)) == (5, 3)
    assert type(other) == diffusers.EulerDiscreteScheduler


def test_a_pickle_and_an_unheard_copy_are_plain():
    scheduler = diffusers.EulerDiscreteScheduler()
    names, _ = heard(scheduler)
    for other in (pickle.loads(pickle.dumps(scheduler)), unheard(scheduler)):
        assert type(other) is diffusers.EulerDiscreteScheduler
        other.set_timesteps(3)
    assert not names


def test_two_listeners_leave_in_any_order():
    scheduler = diffusers.EulerDiscreteScheduler()
    (first, one), (second, two) = heard(scheduler), heard(scheduler)
    scheduler.set_timesteps(3)
    unlisten(scheduler, one)
    scheduler.set_timesteps(3)
    unlisten(scheduler, two)
    scheduler.set_timesteps(3)
    assert (len(first), len(second)) == (1, 2) and type(scheduler) is diffusers.EulerDiscreteScheduler


def test_a_step_that_somebody_wrapped_before_is_heard_and_comes_back():
    pipe = tiny.make("sd15")
    calls: list[int] = []
    inner = pipe.scheduler.step

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    pipe.scheduler.step = wrapped
    handle = fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 2, "warmup_steps": 1})
    tiny.run(pipe, "sd15", steps=6)
    assert (handle.report.cached, len(calls)) == (3, 6)
    handle.restore()
    assert pipe.scheduler.step is wrapped and type(pipe.scheduler) is diffusers.DDIMScheduler


def test_a_saved_pipeline_names_its_scheduler(tmp_path):
    pipe = tiny.make("sd15")
    fastdiff.accelerate(pipe)
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DDIMScheduler
    assert torch.equal(loaded.alphas_cumprod, pipe.scheduler.alphas_cumprod)
