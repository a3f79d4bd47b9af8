"""shapes-unet: a v-prediction StableDiffusionPipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from .denoiser import SIDE_WEIGHT, SideTask, Start, caption_gate, weighted_error
from .loop import Schedule, train
from .text import WIDTH, tokenize

STEPS = 9000


def build(channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=channels, out_channels=channels, block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Ends at a signal of 0.016 (SD: 0.068): flat backgrounds are to come from the caption, not from the noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing",
    )  # fmt: skip


def run(start: Start, steps: int = STEPS) -> Path:
    """Train, then save the pipeline in half precision to `folder`/shapes-unet."""
    examples, tokenizer, warm = start.examples, start.tokenizer, start.warm
    torch.manual_seed(1)
    unet = build(examples.latents.shape[1]).to(memory_format=torch.channels_last)
    text = CLIPTextModel(warm.config)
    text.load_state_dict(warm.state_dict(), strict=False)
    side = SideTask(128, unet.up_blocks[0], lambda output: output.flatten(2).mT)
    ids, empty = examples.tokens(tokenizer), tokenize(tokenizer, [""])[0]
    signal = scheduler().alphas_cumprod

    def error(clean: Tensor, cells: Tensor, times: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
        a = signal[times].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        return weighted_error(unet(noisy, times, text(tokens).last_hidden_state).sample, velocity, cells)

    def loss(_: int) -> Tensor:
        index, clean, cells, drop = examples.pick()
        tokens = torch.where(drop[:, None], empty, ids[index])
        times = torch.randint(len(signal), (len(index),))
        return error(clean, cells, times, tokens, torch.randn_like(clean)) + SIDE_WEIGHT * side(cells)

    @torch.no_grad()
    def gate() -> str:
        clean, cells = examples.latents[:64].float(), examples.cells[:64].long()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        times = torch.full((64,), 800)
        return caption_gate(
            examples.captions[:64], lambda c: error(clean, cells, times, tokenize(tokenizer, c), noise).item()
        )

    modules = {"unet": unet, "text": text, "side": side}
    groups = [
        {"params": [*unet.parameters(), *side.parameters()], "scale": 1.0},
        {"params": list(text.parameters()), "scale": 0.2},
    ]
    schedule = Schedule(steps, 8e-4, decay=0.4)
    train("unet", modules, groups, loss, schedule, start.folder / "unet.pt", average=0.9985, gate=gate, gate_every=500)
    out = start.folder / "shapes-unet"
    StableDiffusionPipeline(
        vae=start.vae.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half().to(memory_format=torch.contiguous_format),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    return out
