"""The calls that a pipeline is calibrated on, on wish with noise in their pictures: a quantized model must bear worse
ones than it was shown.

Source: Q-GESCO, https://arxiv.org/abs/2410.02491; noise variances by signal-to-noise ratio as in its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.errors import BadConfig

IMAGES = ("image", "control_image", "ip_adapter_image", "mask_image")  # arguments of pipelines that are pictures
VARIANCES = (0.0, 0.05, 0.08, 0.13, 0.22, 0.36, 0.6, 0.9)  # of values between 0 and 1: infinite, 30, 25, 20 ... 1 dB


def calls_of(prompts: Sequence[str], seed: int, batch: int, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls that draw these prompts, image k from seed + k, with the arguments `call`. Of as many pictures as there
    are prompts each prompt has its own; `corrupt` among the arguments mixes noise into them, anew in each call.

    Raises BadConfig for `corrupt` without a picture.
    """
    found, given = [], dict(call)
    if (corrupt := given.pop("corrupt", False)) and not any(name in IMAGES for name in given):
        raise BadConfig("corrupt mixes noise into the pictures that are drawn from, and there are none; give one")
    for start in range(0, len(prompts), batch):
        these = slice(start, start + batch)
        own, texts = theirs(given, len(prompts), these), list(prompts[these])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(texts))]
        own = corrupted(own, seed + start) if corrupt else own
        found.append({**own, "prompt": texts, "generator": generators})
    return found


def theirs(call: Mapping[str, Any], count: int, these: slice) -> dict[str, Any]:
    """The arguments for some of `count` prompts: of as many pictures, theirs."""

    def each(name: str, value: Any) -> bool:
        return name in IMAGES and isinstance(value, list) and len(value) == count

    return {name: value[these] if each(name, value) else value for name, value in call.items()}


def corrupted(call: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The arguments of a call, with noise in its pictures: each its own, of a variance drawn from the table."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _noisy(value, generator) if name in IMAGES else value for name, value in call.items()}


def _noisy(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_noisy(part, generator) for part in value)
    variance = VARIANCES[int(torch.randint(len(VARIANCES), (), generator=generator))]
    if isinstance(value, Tensor):
        noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        return value + noise * variance**0.5
    if isinstance(value, Image.Image):
        pixels = torch.from_numpy(np.asarray(value).copy()).float() / 255
        noisy = (pixels + torch.randn(pixels.shape, generator=generator) * variance**0.5).clamp(0, 1) * 255
        return Image.fromarray(noisy.round().to(torch.uint8).numpy(), value.mode)
    return value
