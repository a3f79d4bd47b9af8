"""Law 3: an exception in the middle of a run or of an install leaves everything clean."""

from __future__ import annotations

import pytest
import torch

from fastdiff.caching.session import Session
from fastdiff.clock import StepClock
from fastdiff.errors import BadConfig
from fastdiff.quant.layer import QLayer
from tests import tiny
from tests.laws.rows import (
    ONCE,
    ONE_A_KIND,
    ONE_ROW_A_FAMILY,
    QUANTIZED_KINDS,
    QUANTIZED_ONCE,
    ROWS,
    STEPS,
    SUPPORTED,
    accelerate,
    cached_afresh,
    each,
    neutral,
    plain,
    used,
)  # fmt: skip
from tests.state import differences, snapshot


class Broken(Exception):
    """Raised on purpose."""


def break_after(calls: int):
    """A function of any arguments that raises when it is called for the `calls`-th time."""
    left = [calls]

    def broken(*_args, **_kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise Broken

    return broken


def fail_in_callback(pipe, name):
    def fail(_pipe, step):
        if step == 1:
            raise Broken

    with pytest.raises(Broken):
        tiny.run(pipe, name, steps=STEPS, seed=7, **tiny.at_each_step(name, fail))


def fail_in_denoiser(pipe, name):
    calls = 2 if name in tiny.TWO_CALLS else 1  # of the one step that every row computes
    hook = tiny.deepest_leaf(pipe).register_forward_hook(break_after(calls))
    with pytest.raises(Broken):
        tiny.run(pipe, name, steps=STEPS, seed=7)
    hook.remove()


def fail_while_decoding(pipe, name):
    """The loop runs to its end, what comes after it fails."""
    hook = pipe.vae.register_forward_hook(break_after(1))
    decode, pipe.vae.decode = pipe.vae.decode, break_after(1)
    try:
        with pytest.raises(Broken):
            tiny.run(pipe, name, steps=STEPS, seed=7, output_type="pt")
    finally:
        pipe.vae.decode = decode
        vars(pipe.vae).pop("decode", None)
        hook.remove()


# several runs each; what is forgotten, and when, no family has a part in
@each([*ONE_A_KIND, *QUANTIZED_KINDS], quick=[*ONCE[1::4], *QUANTIZED_ONCE[::3]])
def test_after_an_exception_in_a_run_the_next_call_equals_a_fresh_one(row, name):
    pipe = used(name)
    before = snapshot(pipe)
    handle = accelerate(pipe, row)
    for fail in (fail_in_callback, fail_in_denoiser):
        fail(pipe, name)
        assert torch.equal(tiny.run(pipe, name, steps=STEPS), cached_afresh(row, name)), fail.__name__
    fail_in_denoiser(pipe, name)
    handle.restore()
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), plain(name))
    assert differences(before, snapshot(pipe)) == []


@each(ONE_ROW_A_FAMILY)
def test_after_an_exception_in_the_decoder_the_next_call_equals_a_fresh_one(row, name):
    pipe = tiny.make(name)
    accelerate(pipe, row)
    fail_while_decoding(pipe, name)
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), cached_afresh(row, name))


@each(ONCE, quick=ONCE[::2])
@pytest.mark.parametrize("fail", [fail_in_callback, fail_in_denoiser])
def test_after_an_exception_a_call_of_the_denoiser_alone_is_computed_plainly(row, name, fail):
    pipe = tiny.make(name)
    calls = []
    hook = tiny.denoiser(pipe).register_forward_hook(lambda m, a, k, out: calls.append((a, k, out)), with_kwargs=True)
    tiny.run(pipe, name, steps=STEPS)
    hook.remove()
    args, kwargs, expected = calls[-1]
    accelerate(pipe, row)
    fail(pipe, name)
    with torch.no_grad():
        again = tiny.denoiser(pipe)(*args, **kwargs)
    assert torch.equal(again[0], expected[0])


STAGES = {
    "first unit": (Session, "_wrap_unit", 1),
    "denoiser": (Session, "attach_denoiser", 1),
    "watch": (StepClock, "watch", 1),
    "attach": (StepClock, "attach", 1),
    "layer": (QLayer, "choose_kernel", 5),
}
# no cross-attention, nothing but guidance is left out, or another denoiser runs: the denoiser alone is wrapped
WITHOUT_UNITS = [("tgate", "sd3"), ("tgate flux", "flux"), ("joint conditional", "sd3"), ("switch sd3", "sd3")]


@each([*ONCE, *QUANTIZED_ONCE], quick=[*ONCE[1::3], *QUANTIZED_ONCE[::2], *WITHOUT_UNITS])
@pytest.mark.parametrize(("owner", "stage", "call"), STAGES.values(), ids=STAGES)
def test_an_exception_in_an_install_leaves_the_pipeline_as_it_was(monkeypatch, row, name, owner, stage, call):
    pipe = tiny.make(name)
    before = snapshot(pipe)
    breaks = break_after(call)
    stages = {"late": getattr(owner, stage)}

    def breaks_after_its_work(self, *args, **kwargs):
        stages["late"](self, *args, **kwargs)
        breaks()

    monkeypatch.setattr(owner, stage, breaks_after_its_work)
    if (owner is not StepClock and (owner is Session) != (row in ROWS)) or (
        stage == "_wrap_unit" and (row, name) in WITHOUT_UNITS
    ):  # it has no such stage
        accelerate(pipe, row).restore()
    else:
        with pytest.raises(Broken):
            accelerate(pipe, row)
    monkeypatch.undo()
    assert differences(before, snapshot(pipe)) == []


@each([*ONE_ROW_A_FAMILY, *QUANTIZED_ONCE], quick=ONE_ROW_A_FAMILY)
@pytest.mark.parametrize("error", [BadConfig, RuntimeError, KeyboardInterrupt])
def test_a_second_accelerate_that_fails_keeps_the_first(monkeypatch, row, name, error):
    pipe = tiny.make(name)
    handle = accelerate(pipe, row)
    installed = StepClock.watch

    def watch_but_fail_the_first_time(self, *args):
        installed(self, *args)
        monkeypatch.undo()
        raise error("on purpose")

    monkeypatch.setattr(StepClock, "watch", watch_but_fail_the_first_time)
    with pytest.raises(error):
        neutral(pipe, row)
    assert handle.active
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), cached_afresh(row, name))
    assert handle.report.cached == (ROWS[row].cached if row in ROWS else 0)
    handle.restore()
    assert torch.equal(tiny.run(pipe, name, steps=STEPS), plain(name))


@each((row, name) for row, name in SUPPORTED if name in ("sd15", "pixart"))
def test_after_an_exception_in_a_loop_of_one_s_own_the_denoiser_alone_is_computed_plainly(row, name):
    """No pipeline and no progress bar tells that the loop was left."""
    pipe = tiny.make(name)
    denoiser, text = tiny.denoiser(pipe), {"encoder_hidden_states": torch.ones(1, 4, 32)}
    if name == "pixart":
        text["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}

    def call(t) -> torch.Tensor:
        with torch.no_grad():
            return denoiser(torch.ones(1, 4, 8, 8), timestep=torch.as_tensor(t).expand(1), **text)[0]

    expected = call(500)
    handle = accelerate(pipe, row)
    pipe.scheduler.set_timesteps(STEPS)
    first, second, third, *_ = pipe.scheduler.timesteps
    for t in (first, second):
        pipe.scheduler.step(call(t)[:, :4], t, torch.ones(1, 4, 8, 8))
    assert handle.report.steps == 2
    handle.clock.on_call.append(break_after(1))
    with pytest.raises(Broken):
        call(third)
    assert torch.equal(call(500), expected)
