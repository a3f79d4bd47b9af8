"""Tiny pipelines with a transformer that make videos and sound."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from tests import tiny
from tests.zoo_entry import Entry, latent, noise, text

_NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


def _hunyuan_video() -> DiffusionPipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=3,
        num_refiner_layers=1, patch_size=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None, tokenizer_2=None, **_NO_TEXT,
    )  # fmt: skip


def _hunyuan_video_text() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": noise(1, 32), "negative_pooled_prompt_embeds": noise(1, 32, seed=3)}
    return latent(32, num_frames=5, true_cfg_scale=3.0, **text(32, mask="prompt_attention_mask"), **pooled)


def _ltx() -> DiffusionPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=4, caption_channels=32,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), **_NO_TEXT
    )


def _mochi() -> DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=4, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=32, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    return diffusers.MochiPipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        **_NO_TEXT,
    )  # fmt: skip


def _allegro() -> DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=4,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=2, caption_channels=32,
    )  # fmt: skip
    return diffusers.AllegroPipeline(
        transformer=tiny.lively(transformer), vae=None,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**tiny.SD_BETAS), **_NO_TEXT,
    )  # fmt: skip


def _latte() -> DiffusionPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        out_channels=8, caption_channels=32, cross_attention_dim=24, attention_bias=True, norm_type="ada_norm_single",
        num_embeds_ada_norm=1000, norm_elementwise_affine=False, activation_fn="gelu-approximate", video_length=2,
    )  # fmt: skip
    return diffusers.LattePipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=diffusers.DDIMScheduler(**tiny.SD_BETAS), **_NO_TEXT
    )


def _skyreels() -> DiffusionPipeline:
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=48, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return diffusers.SkyReelsV2Pipeline(transformer=tiny.lively(transformer), vae=None, scheduler=scheduler, **_NO_TEXT)


@tiny.shared
def _oobleck() -> nn.Module:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip


def _stable_audio() -> DiffusionPipeline:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    transformer = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=3, num_layers=4, attention_head_dim=8, num_key_value_attention_heads=2,
        out_channels=3, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=64,
        cross_attention_input_dim=32, num_attention_heads=4,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    return diffusers.StableAudioPipeline(
        vae=_oobleck(), text_encoder=tiny.t5_encoder(), tokenizer=tiny.t5_tokenizer(),
        projection_model=projection.eval(), transformer=tiny.lively(transformer), scheduler=scheduler,
    )  # fmt: skip


_LAST = "transformer.transformer_blocks.3."
_MASKED = "prompt_attention_mask"
ZOO = {
    "hunyuan video": Entry(
        _hunyuan_video, _hunyuan_video_text, "transformer.single_transformer_blocks.2.proj_out", "first_block", calls=2
    ),
    "ltx": Entry(_ltx, lambda: latent(num_frames=9, **text(32, mask=_MASKED)), _LAST + "ff.net.2", "first_block"),
    "mochi": Entry(
        _mochi, lambda: latent(32, num_frames=7, **text(32, mask=_MASKED)), _LAST + "ff.net.2", "first_block"
    ),
    "allegro": Entry(
        _allegro,
        lambda: latent(num_frames=8, clean_caption=False, negative_prompt=None, **text(32, mask=_MASKED)),
        _LAST + "ff.net.2", "first_block",
    ),
    "latte": Entry(
        _latte,
        lambda: latent(video_length=2, clean_caption=False, negative_prompt=None, **text(32)),
        "transformer.temporal_transformer_blocks.2.ff.net.2", "",
    ),
    "skyreels": Entry(
        _skyreels,
        lambda: latent(32, num_frames=5, **text(32)),
        "transformer.blocks.3.ffn.net.2", "first_block", calls=2,
    ),
    "stable audio": Entry(
        _stable_audio,
        lambda: {
            "prompt": "a bell", "negative_prompt": "bad", "output_type": "latent", "guidance_scale": 4.0,
            "audio_end_in_s": 2.0,
        },
        _LAST + "ff.net.2", "first_block",
    ),
}  # fmt: skip
