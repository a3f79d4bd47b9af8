"""Tiny pipelines with a transformer that make pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tests import tiny
from tests.zoo_entry import Entry, latent, noise, picture, text
from tests.zoo_unets import image_encoder, image_processor

_NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
_FLUX_SIZES: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def _flow(shift: float = 3.0, **options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def _flux_like(cls: type[DiffusionPipeline], in_channels: int = 16) -> DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=16,
        pooled_projection_dim=32,
        guidance_embeds=True,
        **_FLUX_SIZES,
    )
    return cls(
        transformer=tiny.lively(transformer), vae=tiny.flow_vae(), text_encoder_2=None, tokenizer_2=None,
        scheduler=_flow(), **_NO_TEXT,
    )  # fmt: skip


def _flux_text(**more: Any) -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": noise(1, 32, seed=3)}
    return latent(max_sequence_length=16, **text(32, negative=False), **pooled, **more)


def _flux_guided(**more: Any) -> dict[str, Any]:
    pooled = {"negative_pooled_prompt_embeds": noise(1, 32, seed=4)}
    return _flux_text(true_cfg_scale=3.0, **more) | text(32) | pooled


def _flux2() -> DiffusionPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return diffusers.Flux2Pipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT)


def _chroma() -> DiffusionPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
        **_FLUX_SIZES,
    )  # fmt: skip
    return diffusers.ChromaPipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT)


def _bria() -> DiffusionPipeline:
    transformer = diffusers.BriaTransformer2DModel(patch_size=1, in_channels=16, **_FLUX_SIZES)
    return diffusers.BriaPipeline(
        transformer=tiny.lively(transformer), vae=tiny.flow_vae(), scheduler=_flow(), text_encoder=tiny.t5_encoder(),
        tokenizer=tiny.t5_tokenizer(),
    )  # fmt: skip


def _ovis() -> DiffusionPipeline:
    transformer = diffusers.OvisImageTransformer2DModel(patch_size=1, in_channels=16, out_channels=16, **_FLUX_SIZES)
    return diffusers.OvisImagePipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT)


def _pixart_alpha() -> DiffusionPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        cross_attention_dim=24, caption_channels=32, in_channels=4, out_channels=8,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=diffusers.DPMSolverMultistepScheduler(), **_NO_TEXT
    )


def _sana() -> DiffusionPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, num_attention_heads=2, attention_head_dim=8, caption_channels=32,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return diffusers.SanaPipeline(transformer=tiny.lively(transformer), vae=None, scheduler=scheduler, **_NO_TEXT)


def _auraflow() -> DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=tiny.lively(transformer), vae=tiny.image_vae(), scheduler=_flow(1.73), **_NO_TEXT
    )


def _lumina2() -> DiffusionPipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=2, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=32,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(6.0), **_NO_TEXT)


def _zimage() -> DiffusionPipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=4, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT)


def _zimage_text() -> dict[str, Any]:
    return latent(prompt_embeds=[noise(8, 32, seed=1)], negative_prompt_embeds=[noise(8, 32, seed=2)])


def _hunyuan_dit() -> DiffusionPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        hidden_size=24, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=8,
        text_len_t5=8, activation_fn="gelu-approximate",
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=diffusers.DDPMScheduler(**tiny.SD_BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **_NO_TEXT,
    )  # fmt: skip


def _hunyuan_dit_text() -> dict[str, Any]:
    first = text(32, mask="prompt_attention_mask", tokens=8)
    second = {f"{name}_2": value for name, value in text(32, mask="prompt_attention_mask", tokens=8).items()}
    return latent(use_resolution_binning=False, **first, **second)


def _qwen() -> DiffusionPipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT)


def _cogview4() -> DiffusionPipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4, text_embed_dim=32,
        time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
    )  # fmt: skip
    return diffusers.CogView4Pipeline(transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT)


def _cogview3() -> DiffusionPipeline:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4, text_embed_dim=32,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return diffusers.CogView3PlusPipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=diffusers.CogVideoXDDIMScheduler(), **_NO_TEXT
    )


def _hidream() -> DiffusionPipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 32], text_emb_dim=32, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=[0, 1, 1, 1, 1],
    )  # fmt: skip
    encoders = {f"{part}_{k}": None for part in ("text_encoder", "tokenizer") for k in (2, 3, 4)}
    pipe = diffusers.HiDreamImagePipeline(
        transformer=tiny.lively(transformer), vae=None, scheduler=_flow(), **_NO_TEXT, **encoders
    )
    pipe.default_sample_size = 8  # every size asked for is scaled up to it
    return pipe


def _hidream_text() -> dict[str, Any]:
    told = latent()
    for seed, negative in enumerate(("", "negative_")):
        told[f"{negative}prompt_embeds_t5"] = noise(1, 8, 32, seed=seed)
        told[f"{negative}prompt_embeds_llama3"] = noise(2, 1, 8, 32, seed=seed)
        told[f"{negative}pooled_prompt_embeds"] = noise(1, 32, seed=seed)
    return told


def _dit() -> DiffusionPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(
        transformer=tiny.lively(transformer), vae=tiny.image_vae(), scheduler=diffusers.DDIMScheduler()
    )


def _kandinsky_prior() -> DiffusionPipeline:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=4, embedding_dim=32, num_embeddings=77,
    )  # fmt: skip
    return diffusers.KandinskyV22PriorPipeline(
        prior=tiny.lively(prior), image_encoder=image_encoder(), image_processor=image_processor(),
        text_encoder=tiny.clip_encoder(transformers.CLIPTextModelWithProjection), tokenizer=tiny.clip_tokenizer(),
        scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
    )  # fmt: skip


_SINGLE = "transformer.single_transformer_blocks.2."
_LAST = "transformer.transformer_blocks.3."
_MASKED = "prompt_attention_mask"
ZOO = {
    "flux img2img": Entry(
        lambda: _flux_like(diffusers.FluxImg2ImgPipeline),
        lambda: _flux_guided(image=picture(), strength=0.5),
        _SINGLE + "proj_out", "first_block", calls=2, listed=2,
    ),
    "flux fill": Entry(
        lambda: _flux_like(diffusers.FluxFillPipeline, in_channels=16 + 16 + 256),
        lambda: _flux_text(image=picture(), mask_image=torch.ones(1, 1, 64, 64)),
        _SINGLE + "proj_out", "first_block",
    ),
    "flux kontext": Entry(
        lambda: _flux_like(diffusers.FluxKontextPipeline),
        lambda: _flux_guided(image=picture(), _auto_resize=False, max_area=64 * 64),
        _SINGLE + "proj_out", "first_block", calls=2,
    ),
    "flux2": Entry(_flux2, lambda: latent(**text(32, negative=False)), _SINGLE + "attn.to_out", "first_block"),
    "chroma": Entry(
        _chroma,
        lambda: latent(**text(32, mask=_MASKED, dtype=torch.float32)),
        _SINGLE + "proj_out", "first_block", calls=2,
    ),
    "bria": Entry(_bria, lambda: latent(prompt="a cat", negative_prompt="bad"), _SINGLE + "proj_out", "first_block"),
    "ovis": Entry(
        _ovis, lambda: latent(negative_prompt=None, **text(32)), _SINGLE + "proj_out", "first_block", calls=2
    ),
    "pixart alpha": Entry(
        _pixart_alpha,
        lambda: latent(use_resolution_binning=False, **text(32, mask=_MASKED), negative_prompt=None),
        _LAST + "ff.net.2", "first_block",
    ),
    "sana": Entry(
        _sana,
        lambda: latent(256, use_resolution_binning=False, negative_prompt=None, **text(32, mask=_MASKED)),
        _LAST + "ff.conv_point", "first_block",
    ),
    "auraflow": Entry(
        _auraflow, lambda: latent(**text(32, mask=_MASKED)), _SINGLE + "ff.out_projection", "first_block"
    ),
    "lumina2": Entry(
        _lumina2,
        lambda: latent(**text(32, mask=_MASKED)),
        "transformer.layers.3.feed_forward.linear_2", "first_block", calls=2,
    ),
    "z image": Entry(_zimage, _zimage_text, "transformer.layers.3.feed_forward.w2", "first_block"),
    "hunyuan dit": Entry(_hunyuan_dit, _hunyuan_dit_text, "transformer.blocks.3.ff.net.2", "first_block"),
    "qwen image": Entry(
        _qwen,
        lambda: latent(true_cfg_scale=3.0, guidance_scale=None, **text(32, mask="prompt_embeds_mask")),
        _LAST + "img_mlp.net.2", "first_block", calls=2,
    ),
    "cogview4": Entry(_cogview4, lambda: latent(**text(32)), _LAST + "attn1.to_out.0", "first_block", calls=2),
    "cogview3": Entry(_cogview3, lambda: latent(**text(32)), _LAST + "ff.net.2", "first_block"),
    "hidream": Entry(_hidream, _hidream_text, "transformer.single_stream_blocks.2.block.attn1.to_out", "first_block"),
    "dit": Entry(
        _dit,
        lambda: {"class_labels": [1], "guidance_scale": 4.0, "output_type": "np"},
        _LAST + "ff.net.2", "first_block",
    ),
    "kandinsky prior": Entry(
        _kandinsky_prior,
        lambda: {"prompt": "a red cat", "negative_prompt": "bad", "output_type": "pt", "guidance_scale": 4.0},
        "prior.transformer_blocks.3.ff.net.2", "first_block",
    ),
}  # fmt: skip
