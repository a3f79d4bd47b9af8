"""Tiny denoisers of videos, sound and other things that have no pipeline in the zoo."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo_denoisers import HUNYUAN
from tests.zoo_entry import noise
from tests.zoo_loop import Denoiser, Given, ids, ones, plain, text

_WAN: Given = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 48, "num_layers": 4, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip
_KANDINSKY: Given = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16, "model_dim": 32,
    "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 4, "axes_dims": (4, 6, 6),
}  # fmt: skip
_CLIP = (1, 4, 3, 8, 8)


def _masked(x: Tensor, t: Tensor) -> Given:
    return plain(x, t) | {"encoder_attention_mask": ones()}


def _packed() -> Given:
    """MiniMax H3: text, sound and video in one sequence of 7 + 5 + 12 tokens."""
    tags = torch.tensor([1] * 7 + [2] * 5 + [0] * 12)
    return {
        "timestep_indices": (tags == 2).long(), "token_tags": tags, "position_ids": ids(24),
        "text_indices": torch.arange(7), "audio_indices": torch.arange(7, 12), "video_indices": torch.arange(12, 24),
    }  # fmt: skip


def _cosmos3(x: Tensor, t: Tensor) -> Given:
    places = torch.arange(7, 23)
    return {
        "input_ids": torch.arange(7), "text_indexes": torch.arange(7), "position_ids": ids(23).T.long(), "und_len": 7,
        "sequence_length": 23, "vision_tokens": [x], "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": places, "vision_mse_loss_indexes": places, "vision_timesteps": t.expand(16),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }  # fmt: skip


def _camera() -> Tensor:
    """A flat 4 x 4 matrix for each of 3 frames, and a lens in the middle of 8 x 8."""
    where = torch.eye(4).repeat(1, 3, 1, 1)
    where[..., 2, 3] = torch.arange(3) * 0.1
    return torch.cat([where.flatten(-2), torch.tensor([8.0, 8.0, 4.0, 4.0]).expand(1, 3, 4)], -1)


CLIPS = [
    Denoiser(
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0, 3], "vace_in_channels": 8},
        _CLIP,
        lambda x, t: plain(x, t) | {"control_hidden_states": noise(1, 8, 3, 8, 8)},
    ),
    Denoiser(
        "WanAnimateTransformer3DModel",
        {
            **_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        },
        _CLIP,
        lambda x, t: plain(torch.cat([x, noise(1, 8, 3, 8, 8)], 1), t) | {
            "encoder_hidden_states_image": text(16, 257), "pose_hidden_states": noise(1, 4, 2, 8, 8),
            "face_pixel_values": noise(1, 3, 5, 16, 16),
        },
    ),
    Denoiser("ChronoEditTransformer3DModel", _WAN, _CLIP, plain),
    Denoiser(
        "AnyFlowTransformer3DModel",
        _WAN,
        (1, 3, 4, 8, 8),
        lambda x, t: plain(x, t[:, None].expand(1, 3)) | {"r_timestep": t[:, None].expand(1, 3) - 50},
    ),
    Denoiser(
        "HeliosTransformer3DModel",
        {**{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        _CLIP,
        lambda x, t: plain(x, t) | {
            "indices_hidden_states": torch.arange(1, 4)[None], "indices_latents_history_short": torch.arange(1)[None],
            "latents_history_short": noise(1, 4, 1, 8, 8),
        },
    ),
    Denoiser(
        "ConsisIDTransformer3DModel",
        {
            "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
            "text_embed_dim": 32, "num_layers": 4, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
            "max_text_seq_length": 7, "is_train_face": True, "cross_attn_interval": 2, "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2, "LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 2, "LFE_output_dim": 21, "LFE_ff_mult": 1,
            "LFE_num_scale": 5,
        },
        (1, 3, 4, 8, 8),
        lambda x, t: plain(x, t) | {"id_cond": noise(1, 8), "id_vit_hidden": [text(8, 2, k) for k in range(5)]},
    ),
    Denoiser(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "num_layers": 4, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": 32, "sample_width": 8,
            "sample_height": 8,
        },
        _CLIP,
        plain,
    ),
    Denoiser(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **HUNYUAN, "patch_size": 2, "guidance_embeds": False, "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 4, 4), "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True,
        },
        _CLIP,
        lambda x, t: _masked(x, t) | {
            "pooled_projections": noise(1, 16), "image_embeds": text(16, 3), "indices_latents": torch.arange(3),
            "latents_clean": noise(1, 4, 2, 8, 8), "indices_latents_clean": torch.arange(2),
            "latents_history_2x": noise(1, 4, 2, 8, 8), "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": noise(1, 4, 16, 8, 8), "indices_latents_history_4x": torch.arange(16),
        },
    ),
    Denoiser(
        "HunyuanVideo15Transformer3DModel",
        {
            **{k: v for k, v in HUNYUAN.items() if k != "num_single_layers"}, "num_layers": 4, "text_embed_2_dim": 16,
            "image_embed_dim": 16, "rope_axes_dim": (4, 4, 4), "target_size": 4,
        },
        (1, 4, 3, 4, 4),
        lambda x, t: _masked(x, t) | {
            "encoder_hidden_states_2": text(16, 3), "encoder_attention_mask_2": ones(3), "image_embeds": text(16, 2),
        },
    ),
    Denoiser(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3,
            "num_single_layers": 4, "num_decoder_layers": 2, "patch_size": 1, "text_embed_dim": 32,
            "rope_axes_dim": (4, 4, 4),
        },
        (1, 4, 3, 4, 4),
        _masked,
    ),
    Denoiser(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4,
            "text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (4, 16, 16), "mlp_ratio": 2,
            "concat_padding_mask": False,
        },
        _CLIP,
        lambda x, t: plain(x, t) | {"fps": 16},
    ),
    Denoiser(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12, "hidden_size": 24, "intermediate_size": 24, "latent_channel": 4, "latent_patch_size": 1,
            "num_attention_heads": 2, "num_hidden_layers": 4, "num_key_value_heads": 1, "patch_latent_dim": 4,
            "rope_axes_dim": [2, 2, 2], "vocab_size": 32,
        },
        (1, 4, 1, 4, 4),
        _cosmos3,
    ),
    Denoiser(
        "Kandinsky5Transformer3DModel",
        _KANDINSKY,
        (1, 3, 8, 8, 4),
        lambda x, t: plain(x, t) | {
            "pooled_projections": noise(1, 16), "text_rope_pos": torch.arange(7),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
        },
    ),
    Denoiser(
        "Kandinsky6Transformer3DModel",
        {**_KANDINSKY, "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        (1, 3, 8, 8, 4),
        lambda x, t: plain(x, t) | {"pooled_projections": noise(1, 16), "audio_hidden_states": text(4, 5)},
    ),
    Denoiser(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
            "num_visual_blocks": 4, "axes_dims": (4, 6, 6), "nabla_window": (1, 1, 1),
        },
        (1, 1, 8, 8, 4),
        lambda x, t: {"hidden_states": torch.cat([x, noise(1, 1, 8, 8, 5)], -1), "timestep": t},
    ),
    Denoiser(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 4, "caption_channels": 32,
            "rope_double_precision": False,
        },
        (1, 32, 4),
        lambda x, t: plain(x, t) | {
            "audio_hidden_states": text(4, 5), "audio_encoder_hidden_states": text(32, seed=2), "num_frames": 2,
            "sigma": t, "height": 4, "width": 4, "audio_num_frames": 5,
        },
    ),
    Denoiser(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
            "caption_channels": 32, "sample_size": 8, "rope_max_seq_len": 32,
        },
        _CLIP,
        plain,
    ),
    Denoiser(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
            "linear_head_dim": 16, "caption_channels": 32, "mlp_ratio": 2.0, "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 4,
        },
        _CLIP,
        lambda x, t: {
            "hidden_states": x, "timestep": t.view(1, 1, 1).expand(1, 1, 3), "encoder_hidden_states": text(32)[None],
            "encoder_attention_mask": ones(), "camera_conditions": _camera(), "chunk_plucker": noise(1, 8, 3, 8, 8),
        },
    ),
    Denoiser(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 4,
            "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "text_dim": 32,
            "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        (1, 12, 16),
        lambda x, t: plain(x, torch.cat([t, t]) / 1000) | {"audio_hidden_states": text(6, 5), **_packed()},
    ),
]  # fmt: skip
OTHERS = [
    Denoiser(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
        },
        (1, 16, 4),
        lambda x, t: plain(x, t / 1000) | {"timestep_r": t / 1000, "context_latents": noise(1, 16, 8)},
    ),
    Denoiser(
        "StableAudio3DiTModel",
        {
            "io_channels": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "cond_token_dim": 32, "global_cond_dim": 16,
            "local_add_cond_dim": 4, "timestep_features_dim": 16, "num_memory_tokens": 3,
        },
        (1, 4, 16),
        lambda x, t: plain(x, t / 1000) | {"global_hidden_states": noise(1, 16)},
    ),
    Denoiser(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 4, "dit_heads": 2, "dit_text_dim": 32, "latent_dim": 4},
        (1, 16, 4),
        lambda x, t: _masked(x, t / 1000) | {"latent_cond": noise(1, 16, 4)},
    ),
    Denoiser(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 4, "condition_dim": 8, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 8,
        },
        (1, 4, 16),
        lambda x, t: plain(x, t / 1000) | {"encoder_hidden_states": text(8, 16)},
    ),
    Denoiser(
        "T5FilmDecoder",
        {
            "input_dims": 4, "targets_length": 16, "d_model": 32, "num_layers": 4, "num_heads": 2, "d_kv": 16,
            "d_ff": 32, "dropout_rate": 0.0,
        },
        (1, 16, 4),
        lambda x, t: {
            "encodings_and_masks": [(text(32), ones(7, torch.float32))], "decoder_input_tokens": x,
            "decoder_noise_time": t / 1000,
        },
    ),
]  # fmt: skip
ZOO = {denoiser.name: denoiser for denoiser in (*CLIPS, *OTHERS)}
