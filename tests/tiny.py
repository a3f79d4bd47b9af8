"""Tiny pipelines of the real diffusers classes with seeded random weights: no downloads, milliseconds a step.

They are for exactness only. On random weights caching looks far better than on trained ones.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

UNETS = ("sd15", "sdxl")
TRANSFORMERS = ("sd3", "flux", "pixart", "wan", "cogvideox")
FAMILIES = (*UNETS, *TRANSFORMERS)
TWO_CALLS = ("flux", "wan")  # cond and uncond are two calls of the denoiser, not one batch
VIDEO = ("wan", "cogvideox")

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make(name: str) -> DiffusionPipeline:
    """A fresh pipeline; the same weights each time. Text encoders and VAEs are shared, denoiser and scheduler not."""
    return twin(_made(name))


@cache
def _made(name: str) -> DiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKERS[name]()


def twin(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Another pipeline that shares text encoders, image encoders and VAE with this one, and nothing else."""
    made = copy.copy(pipe)
    seen: dict[nn.Module, nn.Module] = {}
    for name, part in vars(pipe).items():
        if isinstance(part, nn.Module) and not name.startswith(("vae", "text_encoder", "image_encoder")):
            setattr(made, name, _like(part, seen))
        elif isinstance(part, diffusers.SchedulerMixin):
            setattr(made, name, copy.deepcopy(part))
    made.set_progress_bar_config(disable=True)
    return made


def _like(module: nn.Module, seen: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module with weights, children and hooks of its own: in a tenth of the time of a deep copy or a new one."""
    if module in seen:
        return seen[module]
    own = seen[module] = object.__new__(type(module))
    for name, value in vars(module).items():  # also its configuration, in which diffusers itself writes at times
        vars(own)[name] = type(value)(value) if isinstance(value, (dict, list, set)) else value
    for name, weight in module._parameters.items():
        if weight is not None:
            own._parameters[name] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    own._buffers.update({name: value.clone() for name, value in module._buffers.items() if value is not None})
    own._modules.update({name: _like(child, seen) for name, child in module._modules.items() if child is not None})
    return own


def shared(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Built once, from its own seed, whoever asks first."""

    @cache
    @wraps(build)
    def seeded(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **kwargs).eval()

    return seeded


def denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The UNet or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def arguments(name: str, steps: int = 6, seed: int = 0) -> dict[str, Any]:
    """What a call of the tiny pipeline takes; guidance is on."""
    common = {
        "prompt": "a red cat",
        "negative_prompt": "bad",
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
    }
    special: dict[str, dict[str, Any]] = {
        "sd3": {"max_sequence_length": 16},
        "flux": {"max_sequence_length": 16, "true_cfg_scale": 4.0},
        "pixart": {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
        "wan": {"max_sequence_length": 16, "num_frames": 5, "height": 32, "width": 32},
        "cogvideox": {"max_sequence_length": 16, "num_frames": 8, "height": 32, "width": 32},
    }
    return common | special.get(name, {})


def guidance_off(name: str) -> dict[str, Any]:
    """Arguments that leave one denoiser call of one half batch a step."""
    return {"true_cfg_scale": 1.0, "negative_prompt": None} if name == "flux" else {"guidance_scale": 1.0}


def other_scheduler(name: str) -> Any:
    """A scheduler for this family that visits other times than the pipeline's own."""
    if name in ("sd3", "flux", "wan"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    if name == "cogvideox":
        return diffusers.CogVideoXDPMScheduler()
    return diffusers.UniPCMultistepScheduler(**SD_BETAS)


def at_each_step(name: str, do: Callable[[DiffusionPipeline, int], None]) -> dict[str, Any]:
    """Arguments that make the pipeline call `do(pipe, step)` after every step."""
    if name == "pixart":  # has no newer callback
        return {"callback": lambda step, timestep, latents: do(None, step), "callback_steps": 1}

    def callback(pipe: DiffusionPipeline, step: int, timestep: Any, kwargs: dict) -> dict:
        do(pipe, step)
        return kwargs

    return {"callback_on_step_end": callback}


def deepest_leaf(pipe: DiffusionPipeline) -> nn.Module:
    """A layer that runs exactly when the denoiser is computed in full, whatever a method leaves out otherwise."""
    if hasattr(pipe, "unet"):
        return pipe.unet.mid_block.resnets[0].conv1
    stacks = [child for child in pipe.transformer.children() if isinstance(child, nn.ModuleList)]
    return next(m for m in stacks[-1][-1].modules() if isinstance(m, nn.Linear))


def run(pipe: DiffusionPipeline, name: str, *, steps: int = 6, seed: int = 0, **overrides: Any) -> Tensor:
    """Latents of one call."""
    return pipe(**(arguments(name, steps, seed) | overrides))[0]


@cache
def clip_tokenizer() -> transformers.CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


@cache
def t5_tokenizer(length: int = 16) -> transformers.T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return transformers.T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=length)


@shared
def clip_encoder(cls: type[nn.Module] = transformers.CLIPTextModel) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=32,
    )  # fmt: skip
    return cls(config)


@shared
def t5_encoder(width: int = 32) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


@shared
def image_vae(**options: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1, **options,
    )  # fmt: skip


def flow_vae() -> nn.Module:
    return image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


def lively(model: nn.Module) -> nn.Module:
    """Zero-initialised gates make a random transformer ignore its input; every weight matrix becomes N(0, 1/fan_in)."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    return model.eval()


def _sd15(levels: int = 3, layers_per_block: int = 1) -> DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16, 16)[:levels], layers_per_block=layers_per_block,
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    ).eval()  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=unet, vae=image_vae(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 32), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=(1, 2, 4), norm_num_groups=4, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    ).eval()  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, vae=image_vae(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1), add_watermarker=False,
    )  # fmt: skip


def _sd3() -> DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=16,
    )  # fmt: skip
    encoder = clip_encoder(transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusion3Pipeline(
        transformer=lively(transformer), vae=flow_vae(), text_encoder=encoder, tokenizer=clip_tokenizer(),
        text_encoder_2=encoder, tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(64), tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _flux() -> DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=lively(transformer), vae=flow_vae(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _pixart() -> DiffusionPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=4, cross_attention_dim=32,
        caption_channels=32, in_channels=4, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        transformer=lively(transformer), vae=image_vae(), text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


@shared
def _wan_vae() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _wan() -> DiffusionPipeline:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(
        transformer=lively(transformer), vae=_wan_vae(), text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), transformer_2=None,
    )  # fmt: skip


@shared
def _cogvideox_vae() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip


def _cogvideox() -> DiffusionPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32,
        num_layers=4, sample_width=2, sample_height=2, sample_frames=9, patch_size=2, max_text_seq_length=16,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        transformer=lively(transformer), vae=_cogvideox_vae(), text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip


_MAKERS: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "pixart": _pixart, "wan": _wan, "cogvideox": _cogvideox,
    "sd15_two_layers": lambda: _sd15(levels=4, layers_per_block=2),
}  # fmt: skip
