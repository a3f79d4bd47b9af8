"""Denoisers at their full size on the meta device, and what one call of them takes: shapes and bytes, no memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import diffusers
import torch
from torch import Tensor, nn

from fastdiff.anatomy import Anatomy, recognise
from fastdiff.parallel.rehearsal import Call
from fastdiff.pipelines.families import FAMILIES


def there(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().to(torch.bfloat16).eval().requires_grad_(False)


def sdxl() -> tuple[nn.Module, list[Call]]:
    """1024 x 1024, both halves of guidance in one batch."""
    unet = on_meta(lambda: diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20), use_linear_projection=True, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ))  # fmt: skip
    added = {"text_embeds": there(2, 1280), "time_ids": there(2, 6)}
    told = {"encoder_hidden_states": there(2, 77, 2048), "added_cond_kwargs": added, "return_dict": False}
    return unet, [((there(2, 4, 128, 128), there(1)), told)]


def flux() -> tuple[nn.Module, list[Call]]:
    """1024 x 1024, distilled guidance."""
    model = on_meta(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True))
    told = {
        "hidden_states": there(1, 4096, 64), "encoder_hidden_states": there(1, 512, 4096), "guidance": there(1),
        "pooled_projections": there(1, 768), "timestep": there(1), "img_ids": there(4096, 3), "txt_ids": there(512, 3),
        "return_dict": False,
    }  # fmt: skip
    return model, [((), told)]


def wan() -> tuple[nn.Module, list[Call]]:
    """Wan 2.1 14B, 81 frames at 480 x 832, guidance in two calls."""
    model = on_meta(lambda: diffusers.WanTransformer3DModel(
        num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ))  # fmt: skip
    texts = (there(1, 512, 4096), there(1, 512, 4096))
    shared = {"hidden_states": there(1, 16, 21, 60, 104), "timestep": there(1), "return_dict": False}
    return model, [((), {**shared, "encoder_hidden_states": text}) for text in texts]


MODELS = {"sdxl": sdxl, "flux": flux, "wan": wan}


@cache
def model(name: str) -> tuple[Anatomy, list[Call]]:
    denoiser, calls = MODELS[name]()
    return recognise(denoiser, "unet" if name == "sdxl" else "transformer", FAMILIES), calls
