"""Calls that leave out blocks, loops that look inside, gradients, and answers that must not be shared."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import fastdiff
from tests import tiny
from tests.zoo import ZOO

from .own import text

SKIP = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.9}
STACKS = ["first_block", "ab_cache", "fora", "dbcache", "dicache", "pab", "taylorseer"]


@pytest.mark.parametrize("method", STACKS)
def test_a_call_that_skips_a_layer_is_computed_and_not_remembered(method):
    """Skip-layer guidance calls the transformer once more, without some blocks."""
    more = {"ab_cache": {"site": "stack"}, "first_block": {"threshold": 1e9}, "dbcache": {"threshold": 1e9}}
    more |= {"dicache": {"threshold": 1e9}}
    cache: dict[str, Any] = {"method": method, "warmup_steps": 1, **more.get(method, {})}
    pipe = tiny.make("sd3")
    calls: list[tuple[int, bool]] = []
    handle = fastdiff.accelerate(pipe, cache=cache)
    last = pipe.transformer.transformer_blocks[-1]
    skips: list[bool] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: skips.append(bool(kwargs.get("skip_layers"))), with_kwargs=True
    )
    last.register_forward_pre_hook(lambda *_: calls.append((len(skips), skips[-1])))
    found = tiny.run(pipe, "sd3", steps=8, **SKIP)
    assert torch.isfinite(found).all() and any(skips)
    assert handle.report.cached + handle.report.partly > 0
    rows = handle.report.branches
    assert len(rows) == 2 and (method not in more or set(rows[1]) <= {"computed", "absent"})


@pytest.mark.parametrize("method", ["first_block", "ab_cache"])
def test_the_calls_around_a_skipped_layer_are_as_without_it(method):
    """The branch of guidance is served what it would be served if nobody skipped layers."""
    more = {"first_block": {"threshold": 1e9}, "ab_cache": {"site": "stack"}}[method]
    cache: dict[str, Any] = {"method": method, "warmup_steps": 1, **more}

    def rows(**told: Any) -> list[str]:
        pipe = tiny.make("sd3")
        handle = fastdiff.accelerate(pipe, cache=cache)
        tiny.run(pipe, "sd3", steps=8, **told)
        return handle.report.branches[0]

    assert rows(**SKIP) == rows()


def loop(pipe: Any, steps: int = 6, around: Any = None, grad: bool = False) -> tuple[Tensor, list[Tensor]]:
    pipe.scheduler.set_timesteps(steps)
    generator, seen = torch.Generator().manual_seed(0), []
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    hooks = around(pipe, seen) if around is not None else []
    with torch.set_grad_enabled(grad):
        for t in pipe.scheduler.timesteps:
            given = latents.detach().requires_grad_(grad)
            output = pipe.unet(given, t, encoder_hidden_states=text(0)).sample
            if grad:
                (output.square().sum() + given.sum()).backward()
                seen.append(given.grad)
            latents = pipe.scheduler.step(output.detach(), t, given.detach()).prev_sample
    for hook in hooks:
        hook.remove()
    return latents, seen


CACHES: list[dict[str, Any]] = [
    {"method": "ab_cache", "interval": 2, "warmup_steps": 1},
    {"method": "deepcache", "interval": 3},
    {"method": "easycache", "threshold": 10.0, "warmup_steps": 1},
    {"method": "faster_diffusion", "interval": 3, "noise": 0.0},
    {"method": "tgate", "gate": 0.3},
]


def hooked(pipe: Any, seen: list[Tensor]) -> list[Any]:
    """A loop that keeps a feature of each step for itself."""
    return [pipe.unet.mid_block.register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))]


@pytest.mark.parametrize("cache", CACHES[:4], ids=lambda cache: cache["method"])
def test_a_loop_that_hooks_what_is_left_out_sees_all_of_it(cache):
    pipe = tiny.make("sd15")
    plain, wanted = loop(pipe, around=hooked)
    handle = fastdiff.accelerate(pipe, cache=cache)
    found, seen = loop(pipe, around=hooked)
    assert torch.equal(found, plain) and len(seen) == len(wanted) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert "reads there" in str(handle.report)
    loop(pipe)
    assert handle.report.cached > 0 and "reads there" not in str(handle.report)


class Keeping(AttnProcessor2_0):
    """Keeps what attention is given, as prompt-to-prompt does."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.kept.append(hidden_states)
        return super().__call__(attn, hidden_states, *args, **kwargs)


def test_an_attention_processor_that_keeps_things_sees_every_step():
    pipe, kept = tiny.make("sd15"), []
    handle = fastdiff.accelerate(pipe, cache=CACHES[0])
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Keeping(kept))
    loop(pipe)
    assert len(kept) == 6 and "keep what they see" in str(handle.report)


def test_self_attention_guidance_is_as_without_a_cache():
    """It reads the attention map of the middle block at each step, and calls the UNet once more."""
    pipe = tiny.make("sd15")
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> Tensor:
        return torch.as_tensor(
            pipe("a cat", num_inference_steps=6, sag_scale=0.7, guidance_scale=4.0, output_type="latent", height=64,
                 width=64, generator=torch.Generator().manual_seed(0))[0]
        )  # fmt: skip

    plain = drawn()
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    fastdiff.accelerate(pipe, cache=CACHES[0])
    assert torch.equal(drawn(), plain)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["method"])
def test_gradients_go_through_computed_steps(cache):
    pipe = tiny.make("sd15")
    plain, wanted = loop(pipe, grad=True)
    handle = fastdiff.accelerate(pipe, cache=cache)
    found, seen = loop(pipe, grad=True)
    assert torch.equal(found, plain) and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert "gradients go through" in str(handle.report)


@pytest.mark.parametrize("cache", CACHES[:3], ids=lambda cache: cache["method"])
def test_what_is_kept_holds_no_graph(cache):
    """With gradients on but none asked of the inputs, cached steps are cached, and keep no steps before them alive."""
    pipe = tiny.make("sd15")
    handle = fastdiff.accelerate(pipe, cache=cache)
    pipe.scheduler.set_timesteps(6)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for t in pipe.scheduler.timesteps:
        output = pipe.unet(latents, t, encoder_hidden_states=text(0)).sample
        grads.append(output.requires_grad)
        latents = pipe.scheduler.step(output.detach(), t, latents).prev_sample
    row = handle.report.branches[0]
    assert "cached" in row
    if cache["method"] != "deepcache":  # whose outer layers run
        assert grads == [state == "computed" for state in row]


def test_a_control_net_s_answer_is_not_emptied_by_who_is_given_it():
    """HunyuanDiT takes the residuals off the very list."""
    kept = []

    class Emptying(torch.nn.Module):
        def forward(self, sample: Tensor, controls: list[Tensor]) -> Tensor:
            while controls:
                sample = sample + controls.pop()
            return sample

    pipe = tiny.make("sd15")
    control = diffusers.ControlNetModel.from_unet(pipe.unet)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 3, "warmup_steps": 1})
    forward = pipe.controlnet.forward

    def emptied(*args: Any, **kwargs: Any) -> Any:
        down, mid = forward(*args, **kwargs)
        kept.append(len(down))
        given = list(down)
        down.clear() if isinstance(down, list) else None
        mid.zero_()
        return given, mid

    pipe.controlnet.forward = emptied
    told = {"image": torch.rand(1, 3, 64, 64), "height": 64, "width": 64}
    tiny.run(pipe, "sd15", steps=6, **told)
    assert len(set(kept)) == 1 and kept[0] > 0


def test_hunyuan_with_a_control_net_is_cached_at_its_output():
    entry = ZOO["hunyuan dit"]
    pipe = entry.make()
    taken = inspect.signature(diffusers.HunyuanDiT2DControlNetModel.__init__).parameters
    config = {name: value for name, value in pipe.transformer.config.items() if name in taken}
    transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 6}).eval()
    control = diffusers.HunyuanDiT2DControlNetModel(**config, transformer_num_layers=6).eval()
    kind = diffusers.HunyuanDiTControlNetPipeline
    parts = {**pipe.components, "transformer": transformer, "controlnet": control, "vae": tiny.make("sd15").vae}
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    told = entry.arguments() | {"control_image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}

    def drawn() -> Tensor:
        return torch.as_tensor(pipe(**told, num_inference_steps=6, generator=torch.Generator().manual_seed(0))[0])

    plain = drawn()
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}):
        assert torch.equal(drawn(), plain)
    handle = fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 3, "warmup_steps": 1})
    assert torch.isfinite(drawn()).all() and handle.report.cached == 4
