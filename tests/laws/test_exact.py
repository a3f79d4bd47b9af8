"""Laws 1, 2 and 5: neutral settings change no bit, restore() leaves no trace, pipelines do not touch each other."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff.errors import UnsupportedModel
from fastdiff.registry import registry
from tests import tiny
from tests.laws.rows import (
    ONCE,
    ONE_ROW_A_FAMILY,
    QUANTIZED,
    QUANTIZED_ONCE,
    REFUSED,
    ROWS,
    SCHEMES,
    STEPS,
    SUPPORTED,
    UNLIKE,
    accelerate,
    cached_afresh,
    each,
    neutral,
    plain,
    used,
)  # fmt: skip
from tests.state import differences, snapshot
from tests.tiny import FAMILIES


def test_every_method_has_a_row():
    pictures = {name for name in fastdiff.methods()["cache"] if not registry("cache")[name].language}
    assert {row.method for row in ROWS.values()} == pictures
    assert {scheme.split()[0] for scheme in SCHEMES} == set(fastdiff.methods()["quant"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tiny_pipelines_are_deterministic_and_depend_on_prompt_and_seed(name):
    again = tiny.run(tiny.make(name), name, steps=STEPS)
    assert torch.equal(again, plain(name)) and torch.isfinite(again).all()
    pipe = tiny.make(name)
    assert not torch.equal(tiny.run(pipe, name, steps=STEPS, prompt="dog"), again)
    assert not torch.equal(tiny.run(pipe, name, steps=STEPS, seed=1), again)


@each(SUPPORTED, quick=[*ONCE, *UNLIKE[::4]])
def test_neutral_settings_change_no_bit(row, name):
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe, cache=ROWS[row].neutral)
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), plain(name))
    assert (handle.report.computed, handle.report.cached, handle.report.partly) == (STEPS, 0, 0)
    assert "skipped nothing" in str(handle.report), "0 cached steps must be said"


@pytest.mark.parametrize("name", FAMILIES)
def test_with_nothing_enabled_no_bit_changes(name):
    pipe = tiny.make(name)
    handle = fastdiff.accelerate(pipe)
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), plain(name))
    assert (handle.report.computed, handle.report.cached) == (STEPS, 0)


@each([*SUPPORTED, *QUANTIZED], quick=[*ONCE[::2], *ONE_ROW_A_FAMILY, *QUANTIZED_ONCE[::2]])
def test_restore_leaves_no_trace(row, name):
    pipe = used(name)  # so that the scheduler's end state is in the picture
    before = snapshot(pipe)
    handle = accelerate(pipe, row)
    assert differences(before, snapshot(pipe)), "accelerate patched nothing"
    assert not torch.equal(tiny.run(pipe, name, steps=STEPS), plain(name)), "the settings change nothing"
    handle.restore()
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), plain(name))
    assert differences(before, snapshot(pipe)) == []
    handle.restore()
    assert differences(before, snapshot(pipe)) == [], "a second restore() does nothing"


@each([*SUPPORTED, *QUANTIZED], quick=[*ONCE[::2], *QUANTIZED_ONCE])
def test_the_context_manager_restores_even_if_nothing_ran(row, name):
    pipe = tiny.make(name)
    before = snapshot(pipe)
    with accelerate(pipe, row):
        assert differences(before, snapshot(pipe)), "accelerate patched nothing"
    assert differences(before, snapshot(pipe)) == []


@each(REFUSED)
def test_a_method_that_cannot_work_on_a_model_says_why_and_leaves_it_alone(row, name):
    pipe = tiny.make(name)
    before = snapshot(pipe)
    with pytest.raises(UnsupportedModel, match=ROWS[row].refusal) as refused:
        accelerate(pipe, row)
    assert "\n" not in str(refused.value)
    assert differences(before, snapshot(pipe)) == []


@each(
    [*ONCE, *QUANTIZED_ONCE], quick=[*ONCE[::3], *QUANTIZED_ONCE[::3]]
)  # six runs each, and state is a session's own whatever the family
def test_two_pipelines_of_one_class_do_not_touch_each_other(row, name):
    fast, slow, other = tiny.make(name), tiny.make(name), tiny.make(name)
    before = snapshot(slow)
    accelerate(fast, row)
    neutral(other, row)
    assert differences(before, snapshot(slow)) == []
    inner = []

    def run_the_others(_pipe, step):
        if step == 2:
            inner.extend(tiny.run(pipe, name, steps=STEPS) for pipe in (slow, other))

    outer = tiny.run(fast, name, steps=STEPS, **tiny.at_each_step(name, run_the_others))
    assert torch.equal(outer, cached_afresh(row, name))
    assert all(torch.equal(latents, plain(name)) for latents in inner) and len(inner) == 2


@each(QUANTIZED_ONCE)
def test_a_model_that_is_moved_while_it_is_quantized_is_restored_where_it_went(row, name):
    pipe = tiny.make(name)
    with accelerate(pipe, row):
        tiny.denoiser(pipe).to(torch.float64)
    moved = tiny.denoiser(tiny.make(name)).to(torch.float64).state_dict()
    found = tiny.denoiser(pipe).state_dict()
    assert found.keys() == moved.keys()
    assert all(found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) for key, tensor in moved.items())
