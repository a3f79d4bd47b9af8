"""Scenes, images and latents of the training split, made once and kept beside the checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastdiff.bench.scenes import Scene, labels, render, scenes

SEED = 5


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_images(tensor: Tensor) -> np.ndarray:
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def training_scenes(count: int) -> list[Scene]:
    return scenes(SEED, count, held_out=False)


def training_images(path: Path, count: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3), rendered on the first call."""
    if not path.exists():
        np.save(path, np.stack([render(s) for s in training_scenes(count)]))
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def latents(vae: AutoencoderKL, images: np.ndarray, path: Path) -> Tensor:
    """Scaled latent means, float16 (n, c, 16, 16)."""
    if not path.exists():
        means = [
            vae.encode(to_tensor(images[i : i + 64])).latent_dist.mode() * vae.config.scaling_factor
            for i in range(0, len(images), 64)
        ]
        torch.save(torch.cat(means).half(), path)
    return torch.load(path, weights_only=True)


def cell_labels(count: int, cells: int) -> Tensor:
    """(count, 2, cells, cells) shape and colour labels, see `scenes.labels`."""
    return torch.from_numpy(np.stack([labels(s, cells) for s in training_scenes(count)]).astype(np.int8))
