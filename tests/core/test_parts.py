"""Which components denoise: several denoisers, wrappers around them, components that are None, lists of ControlNets."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, MultiControlNetModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import UnsupportedModel
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.parts import companions, denoisers, schedulers
from fastdiff.pipelines.wrapped import bare
from tests import tiny
from tests.zoo_denoisers import ZOO as BY_THEMSELVES
from tests.zoo_entry import noise
from tests.zoo_images import ZOO

AB = {"method": "ab_cache", "interval": 2, "warmup_steps": 1}


class TwoLoops(DiffusionPipeline):
    """A prior with a scheduler of its own, and a UNet after it, as in unCLIP and Kandinsky 2.2."""

    def __init__(self, prior_prior: Any, prior_scheduler: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(prior_prior=prior_prior, prior_scheduler=prior_scheduler, unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, steps: int) -> Tensor:
        x = noise(1, 32)
        self.prior_scheduler.set_timesteps(steps)
        for t in self.prior_scheduler.timesteps:
            given = {"timestep": t, "proj_embedding": noise(1, 32, seed=1), "encoder_hidden_states": noise(1, 77, 32)}
            x = self.prior_scheduler.step(self.prior_prior(x, **given).predicted_image_embedding, t, x).prev_sample
        latents, text = noise(1, 4, 8, 8), x[:, None].expand(1, 7, 32)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.unet(latents, t, text).sample, t, latents).prev_sample
        return latents


def two_loops() -> TwoLoops:
    prior = ZOO["kandinsky prior"].make()
    known: Any = prior.scheduler
    unet = tiny.make("sd15").unet
    ddim = diffusers.DDIMScheduler(**tiny.SD_BETAS, clip_sample=False)
    return TwoLoops(
        prior.prior, diffusers.DDIMScheduler.from_config(known.config, prediction_type="sample"), unet, ddim
    )


def test_denoisers_are_found_by_what_they_are_called_with_and_the_main_one_is_first():
    pipe = two_loops()
    assert list(denoisers(pipe)) == ["unet", "prior_prior"] and list(schedulers(pipe)) == [
        "scheduler",
        "prior_scheduler",
    ]
    assert [anatomy.family.name for anatomy in anatomies(pipe)] == ["unet2d", "prior"]


def test_a_text_encoder_a_vae_and_an_adapter_are_no_denoisers():
    for name in tiny.FAMILIES:
        assert list(denoisers(tiny.make(name))) == ["unet" if name in tiny.UNETS else "transformer"]


def test_one_model_under_two_names_is_one_denoiser():
    pipe: Any = BY_THEMSELVES["Ideogram4Transformer2DModel"].make()
    pipe.unconditional_transformer = pipe.transformer
    assert list(denoisers(pipe)) == ["transformer"]
    pipe.unconditional_transformer = BY_THEMSELVES["Ideogram4Transformer2DModel"].make().transformer
    assert list(denoisers(pipe)) == ["transformer", "unconditional_transformer"]


def test_each_of_two_loops_is_cached():
    pipe = two_loops()
    plain, ran = pipe(6), {"unet": 0, "prior_prior": 0}
    for name, layer in {"unet": pipe.unet.conv_out, "prior_prior": pipe.prior_prior.norm_out}.items():
        layer.register_forward_hook(lambda *_, name=name: ran.__setitem__(name, ran[name] + 1))
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}):
        assert torch.equal(pipe(6), plain) and ran == {"unet": 6, "prior_prior": 6}
    with fastdiff.accelerate(pipe, cache=AB):
        assert not torch.equal(pipe(6), plain) and ran == {"unet": 9, "prior_prior": 9}
    assert torch.equal(pipe(6), plain)


def test_a_denoiser_on_which_the_method_cannot_work_is_computed_and_named():
    pipe = two_loops()
    with pytest.warns(UserWarning, match="the prior_prior is not cached: prior is no UNet"):
        handle = fastdiff.accelerate(pipe, cache={"method": "deepcache", "interval": 2})
    pipe(6)
    assert handle.report.cached == 3 and any("the prior_prior is not cached" in note for note in handle.report.notes)
    handle.restore()
    with pytest.raises(UnsupportedModel, match="no stack of transformer blocks"):
        fastdiff.accelerate(tiny.make("sd15"), cache="first_block")


def test_a_denoiser_that_is_none_is_passed_over_and_one_that_is_alone_is_named():
    pipe: Any = tiny.make("wan")
    pipe.transformer, pipe.transformer_2 = None, pipe.transformer
    assert list(denoisers(pipe)) == ["transformer_2"]
    pipe.transformer_2 = None
    with pytest.raises(UnsupportedModel, match="the transformer of this WanPipeline is None; load it"):
        fastdiff.accelerate(pipe, cache="ab_cache")


def test_the_model_inside_a_peft_model_is_patched():
    pipe: Any = tiny.make("sd3")
    inner = pipe.transformer
    pipe.transformer = get_peft_model(inner, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert bare(pipe.transformer) is inner and denoisers(pipe) == {"transformer": inner}
    plain = tiny.run(pipe, "sd3")
    with fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 0}):
        assert torch.equal(tiny.run(pipe, "sd3"), plain)
    with fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 1e9}) as handle:
        assert not torch.equal(tiny.run(pipe, "sd3"), plain) and handle.report.cached == 5
    assert torch.equal(tiny.run(pipe, "sd3"), plain)


def test_a_compiled_denoiser_is_refused_with_what_to_do():
    pipe: Any = tiny.make("sd3")
    inner, plain = pipe.transformer, tiny.run(pipe, "sd3")
    pipe.transformer = torch.compile(inner, backend="eager")
    with pytest.raises(
        UnsupportedModel, match=r"set pipe\.transformer = pipe\.transformer\._orig_mod, and let"
    ) as said:
        fastdiff.accelerate(pipe, cache="ab_cache")
    assert "\n" not in str(said.value)
    pipe.transformer = pipe.transformer._orig_mod
    pipe.transformer.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"set pipe\.transformer\._compiled_call_impl = None"):
        fastdiff.accelerate(pipe, cache="ab_cache")
    pipe.transformer._compiled_call_impl = None
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}):
        assert torch.equal(tiny.run(pipe, "sd3"), plain)


def test_compiled_blocks_stay_where_nothing_in_them_is_patched():
    pipe: Any = tiny.make("sd3")
    for block in pipe.transformer.transformer_blocks:
        block._compiled_call_impl = block._call_impl  # as block.compile() does, without the wait for a compiler
    plain = tiny.run(pipe, "sd3")
    with fastdiff.accelerate(pipe, cache={"method": "ab_cache", "interval": 1}):
        assert torch.equal(tiny.run(pipe, "sd3"), plain)
    for method in ("first_block", "fora"):
        with pytest.raises(UnsupportedModel, match=r"transformer\.transformer_blocks\.\d was compiled before"):
            fastdiff.accelerate(pipe, cache=method)


def test_the_arguments_of_a_block_that_torch_compile_wraps_are_those_of_the_block():
    pipe: Any = tiny.make("sd3")
    plain = tiny.run(pipe, "sd3")
    with torch.compiler.set_stance("force_eager"):
        for number, block in enumerate(pipe.transformer.transformer_blocks):
            pipe.transformer.transformer_blocks[number] = torch.compile(block)
        with fastdiff.accelerate(pipe, cache={"method": "first_block", "threshold": 0}):
            assert torch.equal(tiny.run(pipe, "sd3"), plain)


def test_each_of_several_controlnets_is_a_companion():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    several = SimpleNamespace(controlnet=[first, second], scheduler=None)
    assert companions(several) == (first, second)
    multi = MultiControlNetModel([])
    assert companions(SimpleNamespace(controlnet=multi)) == (multi,)
    assert companions(SimpleNamespace(controlnet=first, controlnet_2=second, unet=nn.Linear(1, 1))) == (first, second)
    assert companions(SimpleNamespace(controlnet=None)) == ()


def test_a_controlnet_is_no_denoiser_though_it_is_called_with_a_time():
    pipe: Any = tiny.make("sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.controlnet = diffusers.ControlNetModel.from_unet(pipe.unet)
    assert list(denoisers(pipe)) == ["unet"]


def test_several_controlnets_are_asked_where_their_answer_is_used_only():
    base: Any = tiny.make("sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        controls = [diffusers.ControlNetModel.from_unet(base.unet).eval() for _ in range(2)]
    pipe: Any = diffusers.StableDiffusionControlNetPipeline(
        **base.components, controlnet=controls, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    asked = [0, 0]
    for k, control in enumerate(controls):
        control.conv_in.register_forward_hook(lambda *_, k=k: asked.__setitem__(k, asked[k] + 1))
    told = {"image": [torch.ones(1, 3, 64, 64)] * 2, "controlnet_conditioning_scale": [0.5, 0.7]}
    plain = tiny.run(pipe, "sd15", **told)
    with fastdiff.accelerate(pipe, cache={"method": "static", "compute_steps": [0, 1, 2, 3, 4, 5]}):
        assert torch.equal(tiny.run(pipe, "sd15", **told), plain) and asked == [12, 12]
    with fastdiff.accelerate(pipe, cache={"method": "static", "compute_steps": [0, 3]}):
        assert not torch.equal(tiny.run(pipe, "sd15", **told), plain) and asked == [14, 14]
