"""The autoencoder: 64x64 px to 16x16 latents; colour differences and objects weigh more than flat background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fastdiff.bench.checker import mark, summary
from fastdiff.bench.scenes import render, scenes

from .data import to_images, to_tensor
from .loop import Schedule, train

CROP, BATCH, STEPS = 32, 8, 10000


def build(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def _crops(images: np.ndarray) -> Tensor:
    """Crops around edges, four times in five; random ones else."""
    out = np.empty((BATCH, CROP, CROP, 3), np.uint8)
    span = images.shape[1] - CROP
    for k, index in enumerate(torch.randint(len(images), (BATCH,)).tolist()):
        image = images[index]
        corner = torch.randint(span + 1, (2,)).tolist()
        edges = np.flatnonzero(np.abs(np.diff(image.astype(np.int16), axis=0)).sum(-1) > 60)
        if len(edges) and torch.rand(()) < 0.8:
            at = divmod(int(edges[int(torch.randint(len(edges), ()))]), image.shape[1])
            corner = [int(np.clip(a - CROP // 2 + int(torch.randint(-6, 7, ())), 0, span)) for a in at]
        out[k] = image[corner[0] : corner[0] + CROP, corner[1] : corner[1] + CROP]
    return to_tensor(out).contiguous(memory_format=torch.channels_last)


def _loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, 1)
    logvar = logvar.clamp(-12, 4)
    y = vae.decoder(vae.post_quant_conv(mean + torch.randn_like(mean) * (0.5 * logvar).exp()))
    d = y - x
    flat = x.flatten(2).median(-1).values[..., None, None]
    weight = 1 + 2 * ((x - flat).abs().amax(1) > 0.3).float()
    pixel = (d.abs() + 0.5 * d * d).mean(1)
    chroma = (d[:, 0] - d[:, 1]).abs() + ((d[:, 0] + d[:, 1]) / 2 - d[:, 2]).abs()
    edges = (d[:, :, 1:] - d[:, :, :-1]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return ((pixel + 0.7 * chroma) * weight).mean() + 0.5 * edges + 1e-4 * divergence


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, count: int = 128) -> dict[str, float]:
    """Checker summary and PSNR of held-out images after encoding and decoding."""
    held_out = scenes(99, count, held_out=True)
    images = np.stack([render(s) for s in held_out])
    decoded = to_images(vae.decode(vae.encode(to_tensor(images)).latent_dist.mode()).sample)
    error = ((decoded.astype(np.float64) - images) / 255) ** 2
    return summary([mark(i, s) for i, s in zip(decoded, held_out, strict=True)]) | {
        "psnr": float(-10 * np.log10(error.mean()))
    }


def run(folder: Path, images: np.ndarray, channels: int, steps: int = STEPS) -> AutoencoderKL:
    """Train to `steps`, set the scaling factor to one over the latent deviation, save to `folder`/vae."""
    if (folder / "vae" / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(0)
    vae = build(channels).to(memory_format=torch.channels_last)

    def gate() -> str:
        result = reconstruction(vae.eval())
        vae.train()
        return f"psnr {result['psnr']:.2f} colour {result['colour']:.3f} all {result['all_correct']:.3f}"

    groups = [{"params": list(vae.parameters()), "scale": 1.0}]
    schedule = Schedule(steps, 2.5e-3, decay=0.8)
    train("vae", {"vae": vae}, groups, lambda _: _loss(vae, _crops(images)), schedule, folder / "vae.pt", gate=gate)
    vae.eval()
    with torch.no_grad():
        sample = vae.encode(to_tensor(images[:512])).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / sample.std()), shift_factor=0.0)
    result = reconstruction(vae, 256)
    if result["all_correct"] < 0.9:
        raise SystemExit(f"the autoencoder is not good enough to train a denoiser on: {result}")
    nn.Module.to(vae, memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    return vae
