"""Tiny denoisers of pictures that have no pipeline in the zoo; each entry is one class of diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo_entry import noise
from tests.zoo_loop import Denoiser, Given, ids, ones, plain, text

_FLUX: Given = {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
HUNYUAN: Given = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
    "num_single_layers": 3, "num_refiner_layers": 1, "text_embed_dim": 32,
}  # fmt: skip


def _flux_like(x: Tensor, t: Tensor) -> Given:
    return plain(x, t / 1000) | {"img_ids": ids(16), "txt_ids": ids(7)}


IMAGES = [
    Denoiser(
        "BriaFiboTransformer2DModel",
        {**_FLUX, "in_channels": 4, "text_encoder_dim": 24},
        (1, 16, 4),
        lambda x, t: _flux_like(x, t) | {"text_encoder_layers": [text(24, seed=k) for k in range(5)]},
    ),
    Denoiser(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4, "dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 24,
            "injection_layer_ids": (1, 2), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32),
        },
        (1, 4, 8, 8),
        lambda x, t: {"hidden_states": x, "timestep": t / 1000, "encoder_hidden_states": noise(1, 3, 7, 24)},
    ),
    Denoiser(
        "LongCatImageTransformer2DModel",
        {**_FLUX, "in_channels": 4, "pooled_projection_dim": 32},
        (1, 16, 4),
        _flux_like,
    ),
    Denoiser(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 4, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        (1, 16, 4),
        lambda x, t: plain(x, t / 1000) | {"img_ids": ids(16, 4), "txt_ids": ids(7, 4)},
    ),
    Denoiser(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
            "context_in_dim": 32, "axes_dims_rope": (4, 6, 6), "causal_condition": False,
        },
        (1, 16, 4),
        lambda x, t: plain(x, t / 1000) | {
            "img_shapes": [[(1, 4, 4)]], "img_mask": torch.arange(11)[None] > 6,
        },
    ),
    Denoiser(
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 16, "out_channels": 4, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), "mlp_ratio": 8.0, "num_experts": 2,
            "moe_intermediate_dim": 16, "capacity_factors": 2.0, "dense_moe_strategy": "none",
        },
        (1, 16, 16),
        lambda x, t: plain(x, t / 1000) | {"img_shapes": [(1, 4, 4)]},
    ),
    Denoiser(
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN, "patch_size": (1, 1), "rope_axes_dim": (6, 6)},
        (1, 4, 4, 4),
        lambda x, t: plain(x, t) | {"encoder_attention_mask": ones()},
    ),
    Denoiser(
        "Transformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 4, "sample_size": 8,
            "patch_size": 2, "norm_type": "ada_norm_single", "cross_attention_dim": 16, "caption_channels": 32,
            "use_additional_conditions": False, "num_embeds_ada_norm": 1000, "attention_bias": True,
        },
        (1, 4, 8, 8),
        lambda x, t: plain(x, t) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    Denoiser(
        "GlmImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 4,
            "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 16,
        },
        (1, 4, 8, 8),
        lambda x, t: plain(x, t) | {
            "prior_token_id": torch.arange(16)[None] % 16, "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": torch.tensor([[64.0, 64.0]]), "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
    ),
    Denoiser(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_attention_heads": 3,
            "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 32,
        },
        (1, 4, 8, 8),
        lambda x, t: plain(x, 1 - t / 1000) | {
            "encoder_mask": ones(), "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), noise(8, 8, 4)),
            "cross_attention_kwargs": {},
        },
    ),
    Denoiser(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 32, "num_layers": 4, "pad_token_id": 0, "vocab_size": 64, "time_step_dim": 16,
            "max_position_embeddings": 64, "original_max_position_embeddings": 64, "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "hidden_states": x, "timestep": t / 1000, "input_ids": torch.arange(1, 8)[None], "input_img_latents": [],
            "input_image_sizes": {}, "attention_mask": torch.ones(1, 24, 24), "position_ids": torch.arange(24)[None],
        },
    ),
    Denoiser(
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 4,
            "axes_dim": [8, 8],
        },
        (1, 4, 8, 8),
        lambda x, t: plain(x, t / 1000),
    ),
    Denoiser(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 48, "in_channels": 4,
            "out_channels": 4, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6),
        },
        (1, 4, 4, 4),
        lambda x, t: {"hidden_states": x, "timestep": t, "text_bth": text(32), "text_lens": torch.tensor([7])},
    ),
    Denoiser(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16,
            "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        (1, 16, 4),
        lambda x, t: {
            "hidden_states": x, "timestep": t / 1000, "encoder_hidden_states": noise(1, 7, 2, 16),
            "position_ids": ids(23),
        },
    ),
    Denoiser(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
            "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 32, "mrope_section": (4, 2, 2),
        },
        (1, 23, 4),
        lambda x, t: {
            "hidden_states": x, "timestep": t / 1000, "encoder_hidden_states": text(32, 23),
            "position_ids": ids(23)[None].long(), "segment_ids": torch.ones(1, 23, dtype=torch.long),
            "indicator": torch.where(torch.arange(23) < 7, 3, 2)[None],
        },
    ),
    Denoiser(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32, "num_layers": 4,
            "rope_dim_list": [4, 6, 6],
        },
        (1, 4, 1, 8, 8),
        plain,
    ),
    Denoiser(
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32, "num_layers": 4,
            "rope_dim_list": [4, 6, 6],
        },
        (1, 16, 4, 1, 2, 2),
        lambda x, t: plain(x, t) | {"encoder_hidden_states_mask": ones(), "shape_list": [[(1, 4, 4)]]},
    ),
]  # fmt: skip
ZOO = {denoiser.name: denoiser for denoiser in IMAGES}
