"""What stock pipelines can do besides text to image: neutral settings change nothing, cached steps obey the feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import fastdiff
from tests import tiny
from tests.zoo_entry import noise
from tests.zoo_unets import image_encoder, image_processor

STEPS = 6
NEUTRAL = {
    "ab_cache": {"interval": 1},
    "deepcache": {"interval": 1},
    "first_block": {"threshold": 0},
    "fora": {"interval": 1},
    "faster_diffusion": {"interval": 1},
    "tgate": {"gate": 1.0},
}
AGGRESSIVE = {
    "ab_cache": {"interval": 2, "warmup_steps": 1},
    "deepcache": {"interval": 3},
    "first_block": {"threshold": 1e9, "max_consecutive_cached": 2},
    "fora": {"interval": 2},
    "faster_diffusion": {"interval": 3},
    "tgate": {"gate": 0.5},
}
OF_A_UNET = ("ab_cache", "deepcache", "fora", "faster_diffusion", "tgate")
OF_A_TRANSFORMER = ("ab_cache", "first_block", "fora", "faster_diffusion", "tgate")


def neutral(method: str) -> dict[str, Any]:
    return {"method": method, **NEUTRAL[method]}


def aggressive(method: str) -> dict[str, Any]:
    return {"method": method, **AGGRESSIVE[method]}


def image(seed: int, size: int = 64) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def half(top: bool) -> Tensor:
    """A mask of the upper or the lower half."""
    rows = torch.zeros(1, 1, 64, 64)
    rows[:, :, :32] = 1
    return rows if top else 1 - rows


def rebuilt(cls: type[DiffusionPipeline], name: str, **more: Any) -> DiffusionPipeline:
    """A pipeline of another class with the components of a tiny one."""
    pipe = cls(**{**tiny.make(name).components, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def visible(control: nn.Module) -> nn.Module:
    """Zero convolutions would make a control image invisible."""
    for layer in control.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.2)
    return control.eval()


def controlled(cls: type[DiffusionPipeline], name: str) -> DiffusionPipeline:
    base = tiny.make(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        control = visible(diffusers.ControlNetModel.from_unet(base.unet, conditioning_channels=3))
    pipe = cls(**base.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlled_sd3() -> DiffusionPipeline:
    base = tiny.make("sd3")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        control = diffusers.SD3ControlNetModel.from_transformer(
            base.transformer, num_layers=2, num_extra_conditioning_channels=0
        )
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**base.components, controlnet=tiny.lively(control))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter_weights(unet: nn.Module, width: int) -> dict[str, dict[str, Tensor]]:
    """The weights of an IP-Adapter, as its files have them: keys and values of each cross-attention, numbered with the
    self-attentions in between, and a projection of the image embedding to 4 tokens."""
    layers: dict[str, Tensor] = {}
    for number, (name, _) in enumerate(unet.attn_processors.items()):
        if "attn1" not in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            layers[f"{number}.to_k_ip.weight"] = noise(inner, width, seed=number)
            layers[f"{number}.to_v_ip.weight"] = noise(inner, width, seed=number + 100)
    projection = {
        "proj.weight": noise(4 * width, 32, seed=7), "proj.bias": noise(4 * width, seed=8),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}


def load_adapter(pipe: DiffusionPipeline) -> None:
    weights = adapter_weights(pipe.unet, pipe.unet.config.cross_attention_dim)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)


def adapted(name: str) -> DiffusionPipeline:
    cls = type(tiny.make(name))
    pipe = rebuilt(cls, name, image_encoder=image_encoder(), feature_extractor=image_processor())
    load_adapter(pipe)
    return pipe


@dataclass(frozen=True)
class Feature:
    """family: of the tiny pipeline whose arguments are used; given: arguments besides those; other: arguments that the
    result must depend on, in place of some of these."""

    family: str
    build: Callable[[], DiffusionPipeline]
    given: dict[str, Any]
    other: dict[str, Any]
    lost: int = 0  # steps that `strength` takes off

    def run(self, pipe: DiffusionPipeline, **changes: Any) -> Tensor:
        told = {**self.given, **changes}
        if self.family == "sd15" and "strength" in told:  # takes the image's size
            told = {"height": None, "width": None, **told}
        told = tiny.arguments(self.family, STEPS) | told
        told = {key: value for key, value in told.items() if value is not None or key == "negative_prompt"}
        with torch.random.fork_rng():  # SD3's ControlNet encodes its image with torch's own generator
            torch.manual_seed(0)
            return pipe(**told)[0]

    @property
    def methods(self) -> tuple[str, ...]:
        return OF_A_UNET if self.family in tiny.UNETS else OF_A_TRANSFORMER


def _img2img(family: str, cls: type[DiffusionPipeline], **more: Any) -> Feature:
    given = {"image": image(1), "strength": 0.7, **more}
    lost = 2 if family in tiny.UNETS else 1
    return Feature(family, lambda: rebuilt(cls, family), given, {"image": image(2)}, lost)


def _inpaint(family: str, cls: type[DiffusionPipeline], **more: Any) -> Feature:
    given = {"image": image(1), "mask_image": half(True), "strength": 1.0, **more}
    return Feature(family, lambda: rebuilt(cls, family), given, {"mask_image": half(False)})


def _stock(family: str, given: dict[str, Any], other: dict[str, Any]) -> Feature:
    return Feature(family, lambda: tiny.make(family), given, other)


_SIZES = {"height": None, "width": None}
FEATURES = {
    "img2img sd15": _img2img("sd15", diffusers.StableDiffusionImg2ImgPipeline),
    "img2img sdxl": _img2img("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline, **_SIZES),
    "img2img sd3": _img2img("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
    "img2img flux": _img2img("flux", diffusers.FluxImg2ImgPipeline),
    "inpaint sd15": _inpaint("sd15", diffusers.StableDiffusionInpaintPipeline),
    "inpaint sdxl": _inpaint("sdxl", diffusers.StableDiffusionXLInpaintPipeline),
    "inpaint flux": _inpaint("flux", diffusers.FluxInpaintPipeline),
    "controlnet sd15": Feature(
        "sd15", lambda: controlled(diffusers.StableDiffusionControlNetPipeline, "sd15"),
        {"image": image(1)}, {"image": image(2)},
    ),
    "controlnet sdxl": Feature(
        "sdxl", lambda: controlled(diffusers.StableDiffusionXLControlNetPipeline, "sdxl"),
        {"image": image(1)}, {"image": image(2)},
    ),
    "controlnet sd3": Feature("sd3", controlled_sd3, {"control_image": image(1)}, {"control_image": image(2)}),
    "ip adapter sd15": Feature(
        "sd15", lambda: adapted("sd15"), {"ip_adapter_image": image(1)}, {"ip_adapter_image": image(2)}
    ),
    "ip adapter sdxl": Feature(
        "sdxl", lambda: adapted("sdxl"), {"ip_adapter_image": image(1)}, {"ip_adapter_image": image(2)}
    ),
    "pag sd15": Feature(
        "sd15", lambda: rebuilt(diffusers.StableDiffusionPAGPipeline, "sd15", pag_applied_layers="down_blocks.1"),
        {"pag_scale": 3.0}, {"pag_scale": 1.0},
    ),
    "pag without cfg": Feature(
        "sd15", lambda: rebuilt(diffusers.StableDiffusionPAGPipeline, "sd15", pag_applied_layers="down_blocks.1"),
        {"pag_scale": 3.0, "guidance_scale": 1.0}, {"pag_scale": 1.0},
    ),
    "negative prompt sd15": _stock("sd15", {}, {"negative_prompt": "something else"}),
    "negative prompt flux": _stock("flux", {}, {"negative_prompt": "something else"}),
    "no guidance sd15": _stock("sd15", {"guidance_scale": 1.0}, {"prompt": "a blue dog"}),
    "no guidance flux": _stock("flux", {"true_cfg_scale": 1.0, "negative_prompt": None}, {"prompt": "a blue dog"}),
    "guidance rescale sd15": _stock("sd15", {"guidance_rescale": 0.7}, {"guidance_rescale": 0.1}),
    "guidance rescale sdxl": _stock("sdxl", {"guidance_rescale": 0.7}, {"guidance_rescale": 0.1}),
    "several images sd15": _stock("sd15", {"num_images_per_prompt": 3}, {"prompt": "a blue dog"}),
    "several images flux": _stock("flux", {"num_images_per_prompt": 2}, {"prompt": "a blue dog"}),
}  # fmt: skip


def _case(number: int, name: str, method: str) -> Any:
    """A method of each feature is quick, and every method on some of them."""
    place = (OF_A_UNET if FEATURES[name].family in tiny.UNETS else OF_A_TRANSFORMER).index(method)
    quick = (place - number) % 5 == 0 or (len(FEATURES[name].methods) < 5 and method == FEATURES[name].methods[0])
    return pytest.param(name, method, id=f"{name}-{method}", marks=() if quick else pytest.mark.slow)


CASES = [_case(k, name, method) for k, (name, feature) in enumerate(FEATURES.items()) for method in feature.methods]
each = pytest.mark.parametrize(("name", "method"), CASES)
# halving a batch and copying the condition's guidance make no difference where only one is left
NO_GUIDANCE_LEFT = ("no guidance flux", "pag without cfg")


@cache
def plain(name: str) -> Tensor:
    return FEATURES[name].run(FEATURES[name].build())


@each
def test_the_feature_with_settings_that_skip_nothing_is_bit_for_bit_that_of_diffusers(name, method):
    feature = FEATURES[name]
    pipe = feature.build()
    handle = fastdiff.accelerate(pipe, cache=neutral(method))
    assert torch.equal(feature.run(pipe), plain(name))
    assert (handle.report.steps, handle.report.cached) == (STEPS - feature.lost, 0)


@each
def test_cached_steps_go_on_obeying_the_feature_and_restore_takes_them_back(name, method):
    feature = FEATURES[name]
    pipe = feature.build()
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))
    result = feature.run(pipe)
    report = handle.report
    idle = method == "tgate" and name in NO_GUIDANCE_LEFT and feature.family == "flux"
    assert report.steps == STEPS - feature.lost
    assert (report.cached + report.partly == 0) if idle else (report.cached + report.partly >= 1)
    assert result.shape == plain(name).shape and torch.isfinite(result).all()
    assert torch.equal(result, plain(name)) == idle
    assert not torch.equal(feature.run(pipe, **feature.other), result)
    assert torch.equal(feature.run(pipe), result), "nothing of a call reaches the next"
    handle.restore()
    assert torch.equal(feature.run(pipe), plain(name))


def test_a_transformer_with_a_controlnet_is_decoded_step_by_step_and_says_so():
    feature = FEATURES["controlnet sd3"]
    pipe = feature.build()
    handle = fastdiff.accelerate(pipe, cache=aggressive("faster_diffusion"))
    batched = feature.run(pipe)
    assert handle.report.cached == 4 and any("a ControlNet adds" in note for note in handle.report.notes)
    fastdiff.accelerate(pipe, cache={**aggressive("faster_diffusion"), "max_parallel": 1})
    assert torch.equal(feature.run(pipe), batched)


@pytest.mark.parametrize("name", ["pag sd15", "pag without cfg"])
def test_tgate_does_not_take_the_parts_of_pag_for_the_halves_of_guidance(name):
    feature, rows = FEATURES[name], []
    pipe = feature.build()
    handle = fastdiff.accelerate(pipe, cache=aggressive("tgate"))
    pipe.unet.conv_in.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    feature.run(pipe)
    assert rows == [3 if name == "pag sd15" else 2] * STEPS
    assert any("guidance goes on" in note for note in handle.report.notes)


# several pictures in one call


def alone(pipe: DiffusionPipeline, family: str, prompt: str, seed: int) -> Tensor:
    return tiny.run(pipe, family, steps=STEPS, seed=seed, prompt=prompt)


PROMPTS = ["a red cat", "a blue dog"]
BATCHED = [("sd15", m) for m in OF_A_UNET] + [("flux", m) for m in OF_A_TRANSFORMER] + [("sd3", "tgate")]


@pytest.mark.parametrize(("family", "method"), BATCHED)
def test_each_picture_of_a_batch_is_what_it_is_alone(family, method):
    """Guidance in one batch (sd15, sd3), and in two calls (flux). The noise differs from picture to picture."""
    pipe = tiny.make(family)
    handle = fastdiff.accelerate(pipe, cache=aggressive(method))

    def both(prompts: list[str]) -> Tensor:
        told = {"prompt": prompts, "negative_prompt": ["bad"] * 2, "generator": list(map(seeded, (0, 1)))}
        return tiny.run(pipe, family, steps=STEPS, **told)

    found = both(PROMPTS)
    cached = handle.report.cached, handle.report.partly
    assert sum(cached) >= 1
    for k, prompt in enumerate(PROMPTS):
        expected = alone(pipe, family, prompt, k)
        assert (handle.report.cached, handle.report.partly) == cached
        assert torch.allclose(found[k : k + 1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    changed = both([PROMPTS[0], "something else"])
    assert torch.allclose(changed[0], found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))
    assert not torch.allclose(changed[1], found[1], rtol=1e-3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", OF_A_UNET)
def test_pictures_of_one_prompt_are_those_of_their_own_noise(method):
    pipe = tiny.make("sd15")
    fastdiff.accelerate(pipe, cache=aggressive(method))
    found = tiny.run(pipe, "sd15", steps=STEPS, num_images_per_prompt=2, generator=[seeded(0), seeded(1)])
    for k in (0, 1):
        expected = alone(pipe, "sd15", "a red cat", k)
        assert torch.allclose(found[k : k + 1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("setting", ["tiling", "slicing"])
def test_a_vae_that_works_in_parts_decodes_what_cached_steps_made(setting):
    pipe = tiny.make("sd15")
    told = {"output_type": "pt", "num_images_per_prompt": 2, "height": 96, "width": 96}
    try:
        getattr(pipe.vae, f"enable_{setting}")()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 64
        expected = tiny.run(pipe, "sd15", **told)
        fastdiff.accelerate(pipe, cache=neutral("deepcache"))
        assert torch.equal(tiny.run(pipe, "sd15", **told), expected)
        handle = fastdiff.accelerate(pipe, cache=aggressive("deepcache"))
        result = tiny.run(pipe, "sd15", **told)
        assert handle.report.cached == 4 and result.shape == expected.shape == (2, 3, 96, 96)
        assert torch.isfinite(result).all() and not torch.equal(result, expected)
    finally:
        tiny.image_vae.cache_clear()  # the VAE is shared
