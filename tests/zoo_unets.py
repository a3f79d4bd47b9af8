"""Tiny pipelines with a UNet."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from tests import tiny
from tests.zoo_entry import Entry, latent, noise, picture, text

_MID = "unet.mid_block.resnets.0.conv1"
_CROSS_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_CROSS_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_RESAMPLED_BY_RESNETS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}


@tiny.shared
def image_encoder() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16,
        projection_dim=32,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection(config)


@cache
def image_processor() -> Any:
    return transformers.CLIPImageProcessorPil(size=64, crop_size=64)


def small_unet(**options: Any) -> nn.Module:
    standard = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4,
        "cross_attention_dim": 32, "attention_head_dim": 4, "down_block_types": _CROSS_DOWN,
        "up_block_types": _CROSS_UP,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(standard | options)).eval()


def _sd2() -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        unet=small_unet(use_linear_projection=True, attention_head_dim=(2, 4)), vae=tiny.image_vae(),
        text_encoder=tiny.clip_encoder(), tokenizer=tiny.clip_tokenizer(), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(**tiny.SD_BETAS, prediction_type="v_prediction", clip_sample=False),
        requires_safety_checker=False,
    )  # fmt: skip


def _sdxl_refiner() -> DiffusionPipeline:
    unet = small_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=72,
        use_linear_projection=True, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=unet, vae=tiny.image_vae(), text_encoder=None, tokenizer=None, tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_2=tiny.clip_encoder(transformers.CLIPTextModelWithProjection),
        scheduler=diffusers.EulerDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1), requires_aesthetics_score=True,
        add_watermarker=False,
    )  # fmt: skip


def _svd() -> DiffusionPipeline:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 64), num_attention_heads=(2, 4), cross_attention_dim=32,
        addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, latent_channels=4
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **tiny.SD_BETAS, timestep_type="continuous", timestep_spacing="leading", prediction_type="v_prediction",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, steps_offset=1,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        unet=unet.eval(), vae=vae.eval(), image_encoder=image_encoder(), feature_extractor=image_processor(),
        scheduler=scheduler,
    )  # fmt: skip


def _animatediff() -> DiffusionPipeline:
    unet = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=2, cross_attention_dim=32,
        num_attention_heads=2, motion_num_attention_heads=2, use_motion_mid_block=True,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    return diffusers.AnimateDiffPipeline(
        unet=tiny.lively(unet), vae=tiny.image_vae(), text_encoder=tiny.clip_encoder(), motion_adapter=None,
        tokenizer=tiny.clip_tokenizer(), scheduler=diffusers.DDIMScheduler(**tiny.SD_BETAS, clip_sample=False),
    )  # fmt: skip


@tiny.shared
def _movq() -> nn.Module:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, num_vq_embeddings=8, vq_embed_dim=4,
    )  # fmt: skip


def _kandinsky() -> DiffusionPipeline:
    unet = small_unet(
        out_channels=8, addition_embed_type="image", encoder_hid_dim=32, encoder_hid_dim_type="image_proj",
        **_RESAMPLED_BY_RESNETS,
    )  # fmt: skip
    return diffusers.KandinskyV22Pipeline(
        unet=unet, movq=_movq(), scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012)
    )


def _deepfloyd() -> DiffusionPipeline:
    unet = small_unet(
        in_channels=3, out_channels=6, cross_attention_dim=32, encoder_hid_dim=32, attention_head_dim=2,
        addition_embed_type="text", addition_embed_type_num_heads=2, act_fn="gelu", time_embedding_act_fn="gelu",
        **_RESAMPLED_BY_RESNETS,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range", prediction_type="epsilon"
    )
    return diffusers.IFPipeline(
        unet=unet, scheduler=scheduler, text_encoder=tiny.t5_encoder(), tokenizer=tiny.t5_tokenizer(),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


@tiny.shared
def _vocoder() -> nn.Module:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16, sampling_rate=16000, upsample_initial_channel=8, upsample_rates=[5, 4],
        upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]],
    )  # fmt: skip
    return transformers.SpeechT5HifiGan(config)


@tiny.shared
def _language_model() -> nn.Module:
    """Never called: the pipeline asks it for its dtype."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2))


def _audioldm2() -> DiffusionPipeline:
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=((None, 16, 32), (None, 16, 32)), down_block_types=_CROSS_DOWN, up_block_types=_CROSS_UP,
    ).eval()  # fmt: skip
    return diffusers.AudioLDM2Pipeline(
        unet=unet, vae=tiny.image_vae(), text_encoder=None, text_encoder_2=tiny.t5_encoder(), projection_model=None,
        language_model=_language_model(), tokenizer=None, tokenizer_2=None, feature_extractor=None, vocoder=_vocoder(),
        scheduler=diffusers.DDIMScheduler(**tiny.SD_BETAS, clip_sample=False),
    )  # fmt: skip


def _prompt(**more: Any) -> dict[str, Any]:
    return latent(prompt="a red cat", negative_prompt="bad", **more)


def _sound() -> dict[str, Any]:
    known = {"output_type": "latent", "guidance_scale": 4.0, "audio_length_in_s": 0.08}
    states = {"generated_prompt_embeds": noise(1, 8, 16), "negative_generated_prompt_embeds": noise(1, 8, 16, seed=3)}
    return known | text(32, mask="attention_mask") | states


ZOO = {
    "sd2": Entry(_sd2, _prompt, _MID, "deepcache"),
    "sdxl refiner": Entry(
        _sdxl_refiner,
        lambda: {**_prompt(image=picture(), strength=0.5), "height": None, "width": None},
        _MID, "deepcache", listed=2,
    ),
    "svd": Entry(
        _svd,
        lambda: {"image": picture(), "num_frames": 2, "height": 64, "width": 64, "output_type": "latent"},
        "unet.mid_block.resnets.0.spatial_res_block.conv1", "deepcache",
    ),
    "animatediff": Entry(_animatediff, lambda: _prompt(num_frames=2), _MID, "deepcache"),
    "kandinsky": Entry(
        _kandinsky,
        lambda: latent(image_embeds=noise(1, 32), negative_image_embeds=noise(1, 32, seed=2)),
        _MID, "deepcache",
    ),
    "deepfloyd": Entry(
        _deepfloyd,
        lambda: {**latent(16, output_type="pt"), **text(32)},
        _MID, "deepcache",
    ),
    "audioldm2": Entry(_audioldm2, _sound, _MID, "deepcache"),
}  # fmt: skip
