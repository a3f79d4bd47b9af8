"""T-GATE: half a batch after the gate, what stands in for the other half, and inputs that cannot be halved."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

import fastdiff
from tests import tiny
from tests.caching.fakes import did, outputs_of
from tests.laws.rows import CROSS
from tests.zoo import ZOO

STEPS = 6


def gated(pipe, **settings) -> fastdiff.Accelerated:
    return fastdiff.accelerate(pipe, cache={"method": "tgate", "gate": 0.5, **settings})


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart", "cogvideox"])
@pytest.mark.parametrize("guidance", ["drop", "delta"])
def test_after_the_gate_the_denoiser_runs_on_half_the_batch(name, guidance):
    pipe, rows = tiny.make(name), []
    tiny.deepest_leaf(pipe).register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    gated(pipe, guidance=guidance)
    two = {"prompt": ["a red cat", "a dog"], "negative_prompt": ["bad", "worse"]}
    tiny.run(pipe, name, steps=STEPS, **two)
    assert rows == [4, 4, 4, 2, 2, 2]


def test_with_the_gate_at_the_start_nothing_is_halved_before_the_batch_is_known():
    """How many images there are is told by the solver, after the first step."""
    pipe, rows = tiny.make("sd3"), []
    tiny.deepest_leaf(pipe).register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    gated(pipe, gate=0)
    tiny.run(pipe, "sd3", steps=STEPS)
    assert rows == [2, 1, 1, 1, 1, 1]


def calls_of(pipe, name: str):
    """Arguments of each call of the denoiser, and what it gave."""
    seen = []

    def keep(_module, args, kwargs, output):
        seen.append((args, kwargs, output[0].clone()))

    hook = tiny.denoiser(pipe).register_forward_hook(keep, with_kwargs=True)
    tiny.run(pipe, name, steps=STEPS)
    hook.remove()
    return seen


def conditional(pipe, args, kwargs):
    """What the plain denoiser makes of the second halves of its inputs."""
    half = lambda x: x[1:] if isinstance(x, torch.Tensor) and x.ndim and len(x) == 2 else x  # noqa: E731
    with torch.no_grad():
        return tiny.denoiser(pipe)(*map(half, args), **{k: half(v) for k, v in kwargs.items()})[0]


@pytest.mark.parametrize("guidance", ["drop", "delta"])
def test_both_halves_are_made_of_the_conditional_one(guidance):
    """SD 3 has no cross-attention to freeze: what is left is checked against the plain denoiser."""
    fast, plain = tiny.make("sd3"), tiny.make("sd3")
    gated(fast, guidance=guidance, order=1)
    calls = calls_of(fast, "sd3")
    uncond, cond = calls[2][2].chunk(2)
    last = uncond - cond
    for args, kwargs, output in calls[3:]:
        expected = conditional(plain, args, kwargs)
        uncond, cond = output.chunk(2)
        assert torch.allclose(cond, expected, atol=1e-5)
        assert torch.allclose(uncond, expected + (last if guidance == "delta" else 0), atol=1e-5)


def test_a_difference_may_be_extrapolated():
    pipe, times = tiny.make("sd3"), []
    handle = gated(pipe, guidance="delta", predictor="adams_bashforth", order=2)
    handle.clock.on_start.append(lambda run: times.extend(run.timesteps))
    differences = [uncond - cond for uncond, cond in (output.chunk(2) for *_, output in calls_of(pipe, "sd3"))]
    ahead = (times[3] - times[2]) / (times[2] - times[1])
    expected = differences[2] + ahead * (differences[2] - differences[1])
    assert torch.allclose(differences[3], expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("guidance", ["drop", "delta"])
def test_where_guidance_is_two_calls_the_second_is_made_of_the_first(guidance):
    pipe = tiny.make("flux")
    handle = gated(pipe, guidance=guidance)
    outputs = outputs_of(pipe, lambda pipe: tiny.run(pipe, "flux", steps=STEPS))
    cond, uncond = outputs[0::2], outputs[1::2]
    for step in range(3, STEPS):
        difference = uncond[2] - cond[2] if guidance == "delta" else 0
        assert torch.allclose(uncond[step], cond[step] + difference, atol=1e-5)
    assert did(handle, 0) == [True] * STEPS and did(handle, 1) == [True] * 3 + [False] * 3
    assert (handle.report.cached, handle.report.partly) == (0, 3)
    assert "skipped nothing" not in str(handle.report)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_frozen_cross_attention_is_the_average_of_the_halves(name):
    pipe = tiny.make(name)
    layer = next(m for path, m in tiny.denoiser(pipe).named_modules() if path.endswith("attn2"))
    gave: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _m, _a, output: gave.append(output.clone()))
    gated(pipe)
    tiny.run(pipe, name, steps=STEPS)
    assert [len(output) for output in gave] == [2, 2, 2, 1, 1, 1]
    for output in gave[3:]:
        assert torch.allclose(output, gave[2].mean(0, keepdim=True), atol=1e-6)
    assert not torch.allclose(gave[1], gave[2])


@pytest.mark.parametrize("name", CROSS)
def test_keep_freezes_cross_attention_and_goes_on_with_guidance(name):
    """Each half, or each call, has what its own half gave."""
    pipe = tiny.make(name)
    layer = next(m for path, m in tiny.denoiser(pipe).named_modules() if path.endswith("attn2"))
    gave: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _m, _a, output: gave.append(output.clone()))
    gated(pipe, guidance="keep")
    tiny.run(pipe, name, steps=STEPS)
    calls = 2 if name in tiny.TWO_CALLS else 1
    for branch in range(calls):
        own = gave[branch::calls]
        assert all(torch.equal(output, own[2]) for output in own[3:])
        assert not torch.equal(own[1], own[2])
    assert len(gave[0]) == 2 // calls


def test_self_attention_is_computed_at_intervals_before_the_gate_and_always_after():
    pipe, ran = tiny.make("sd15"), []
    layer = next(m for path, m in pipe.unet.named_modules() if path.endswith("attn1.to_q"))
    handle = gated(pipe, self_interval=2, guidance="keep")
    layer.register_forward_hook(lambda *_: ran.append(handle.clock.index))
    tiny.run(pipe, "sd15", steps=10)
    assert ran == [0, 1, 3, 5, 6, 7, 8, 9]


def test_guards_keep_guidance_too():
    """A step that a guard computes is one with both halves."""
    pipe, rows = tiny.make("sd3"), []
    tiny.deepest_leaf(pipe).register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    handle = gated(pipe, max_consecutive_cached=1, cooldown_steps=1)
    tiny.run(pipe, "sd3", steps=8)
    assert rows == [2, 2, 2, 2, 1, 2, 1, 2]
    assert did(handle) == [number == 2 for number in rows]


@pytest.mark.parametrize("guidance", ["drop", "delta"])
def test_without_guidance_nothing_is_halved(guidance):
    pipe, plain = tiny.make("sd3"), tiny.make("sd3")
    gated(pipe, guidance=guidance)
    off = tiny.guidance_off("sd3")
    assert torch.equal(tiny.run(pipe, "sd3", steps=STEPS, **off), tiny.run(plain, "sd3", steps=STEPS, **off))


def test_a_batch_of_three_parts_goes_on():
    """InstructPix2Pix guides by text and by picture: three rows an image, of which none is half."""
    base = tiny.make("sd15")
    unet = type(base.unet).from_config(base.unet.config, in_channels=8).eval()
    parts = {k: v for k, v in base.components.items() if k not in ("unet", "image_encoder")}
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, unet=unet, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    tiny.deepest_leaf(pipe).register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    handle = gated(pipe)
    call = {
        "prompt": "a red cat", "image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)),
        "num_inference_steps": STEPS, "image_guidance_scale": 1.5, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    assert torch.isfinite(pipe(**call)[0]).all()
    assert rows == [3] * STEPS
    assert handle.report.cached == 3, "its cross-attention is frozen all the same"
    assert len(handle.report.notes) == 1 and handle.report.notes[0].startswith("guidance goes on: ")


@pytest.mark.parametrize("name", ["z image", "hidream"])  # the first is given a list of images
def test_inputs_that_cannot_be_halved_go_on_with_a_note(name):
    entry = ZOO[name]
    pipe = entry.make()
    handle = gated(pipe)
    with_it = entry.run(pipe, STEPS)
    handle.restore()
    assert torch.equal(with_it, entry.run(pipe, STEPS))
    assert "guidance goes on: not all inputs of this denoiser are known to have the batch first: " in str(handle.report)
    assert (handle.report.cached, handle.report.partly) == (0, 0)
