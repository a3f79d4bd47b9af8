"""Tiny UNets, and denoisers whose inside no description can say, that have no pipeline in the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo_entry import noise
from tests.zoo_loop import Denoiser, Given, plain, text

_SMALL: Given = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4}
_DEEP: Given = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 32, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}  # fmt: skip
_WAN: Given = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 48, "num_layers": 4, "rope_max_seq_len": 32,
}  # fmt: skip


def _sample(x: Tensor, t: Tensor, **more: Any) -> Given:
    return {"sample": x, "timestep": t, **more}


UNETS = [
    Denoiser(
        "UNet2DModel",
        {
            **_SMALL, "in_channels": 4, "out_channels": 4, "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        (1, 4, 8, 8),
        _sample,
    ),
    Denoiser(
        "UNet3DConditionModel", _DEEP, (1, 4, 3, 8, 8), lambda x, t: _sample(x, t, encoder_hidden_states=text(32))
    ),
    Denoiser(
        "I2VGenXLUNet",
        _DEEP,
        (1, 4, 3, 8, 8),
        lambda x, t: _sample(
            x, t, encoder_hidden_states=text(32), fps=torch.tensor([8]), image_latents=noise(1, 4, 3, 8, 8),
            image_embeddings=noise(1, 32),
        ),
    ),
    Denoiser(
        "DreamLiteUNetModel",
        {
            **_SMALL, "cross_attention_dim": 32, "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        (1, 4, 8, 8),
        lambda x, t: _sample(x, t, encoder_hidden_states=text(32)),
    ),
]  # fmt: skip
CLOSED = [
    Denoiser(
        "UNet1DModel",
        {
            "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16, 32),
            "extra_in_channels": 16, "use_timestep_embedding": False, "time_embedding_type": "fourier",
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "DownBlock1D"),
            "up_block_types": ("UpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"), "mid_block_type": "UNetMidBlock1D",
        },
        (1, 4, 64),
        lambda x, t: {"sample": x, "timestep": t / 1000},
    ),
    Denoiser(
        "Kandinsky3UNet",
        {
            "groups": 2, "attention_head_dim": 4, "layers_per_block": 2, "block_out_channels": (8, 16, 16, 16),
            "time_embedding_dim": 16, "cross_attention_dim": 32, "encoder_hid_dim": 32,
        },
        (1, 4, 8, 8),
        lambda x, t: _sample(x, t, encoder_hidden_states=text(32), encoder_attention_mask=torch.ones(1, 7)),
    ),
    Denoiser(
        "StableCascadeUNet",
        {
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
            "block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 32, "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 16, "dropout": (0.0, 0.0),
        },
        (1, 4, 8, 8),
        lambda x, t: {
            "sample": x, "timestep_ratio": t / 1000, "clip_text_pooled": noise(1, 1, 16), "clip_text": text(32),
            "clip_img": noise(1, 1, 16),
        },
    ),
    Denoiser(
        "AnyFlowFARTransformer3DModel",
        {**_WAN, "chunk_partition": (1, 2)},
        (1, 3, 4, 8, 8),
        lambda x, t: plain(x, t[:, None].expand(1, 3)) | {
            "r_timestep": t[:, None].expand(1, 3) - 50, "chunk_partition": [1, 2],
        },
    ),
]  # fmt: skip
MASKED = Denoiser(
    "UVit2DModel",
    {
        "hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 32, "vocab_size": 17, "codebook_size": 16, "in_channels": 16, "block_out_channels": 16,
        "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 32, "sample_size": 8,
    },
    (1, 16, 8, 8),
    lambda x, t: {
        "input_ids": x.argmax(1), "encoder_hidden_states": text(32), "pooled_text_emb": noise(1, 16),
        "micro_conds": torch.full((1, 5), 8.0),
    },
)  # fmt: skip
ZOO = {denoiser.name: denoiser for denoiser in (*UNETS, *CLOSED, MASKED)}
