"""Small pictures of the latents while they are denoised: one colour a latent channel, no decode of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.images import save

from .console import say

SCALE = 4  # pixels a latent pixel


class Palette:
    """Turns latents into pictures without decoding them."""

    def __init__(self, vae: Any) -> None:
        self.colours, self.grey = projection(vae)

    def picture(self, latents: Tensor) -> Image.Image:
        if latents.ndim != 4 or latents.shape[1] != len(self.colours):
            raise FastdiffError(
                f"previews need latents of {len(self.colours)} channels in rows and columns, this pipeline has "
                f"{tuple(latents.shape)}; draw without them"
            )
        pixels = torch.einsum("chw,cr->hwr", latents[0].float(), self.colours) + self.grey
        image = Image.fromarray(((pixels / 2 + 0.5).clamp(0, 1) * 255).byte().cpu().numpy())
        return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC)


class Shown:
    """A `callback_on_step_end` that shows each step in the terminal while it is entered."""

    def __init__(self, vae: Any, console: Console) -> None:
        self.palette, self.live = Palette(vae), Live(console=console, transient=True)

    @staticmethod
    def console() -> Console:
        """Raises BadConfig where stderr cannot show pictures."""
        found = Console(stderr=True)
        if not found.is_terminal or found.color_system != "truecolor":
            raise BadConfig(
                "--preview shows pictures in a terminal of 24-bit colours, and stderr is none (COLORTERM=truecolor "
                "says that it is); --preview-every K writes them into files"
            )
        return found

    def __enter__(self) -> Shown:
        self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        room = self.live.console.size
        self.live.update(in_blocks(self.palette.picture(values["latents"]), room.width, room.height - 1), refresh=True)
        return values


def in_blocks(image: Image.Image, columns: int, rows: int) -> Text:
    """A picture in characters, each of two pixels one above the other, that leaves room for nothing wider or higher."""
    scale = min(1.0, columns / image.width, 2 * rows / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))
    pixels = np.asarray(image.convert("RGB").resize((width, 2 * height))).tolist()
    text = Text()
    for row in range(height):
        for column in range(width):
            above, below = (",".join(map(str, pixels[2 * row + k][column])) for k in (0, 1))
            text.append("\u2580", f"rgb({above}) on rgb({below})")
        text.append("\n")
    return text


class Previews:
    """A `callback_on_step_end` that saves every so many steps, next to the output."""

    def __init__(self, vae: Any, every: int, target: Path) -> None:
        self.every, self.target, self.palette = every, target, Palette(vae)

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) % self.every == 0:
            path = self.target.with_name(f"{self.target.stem}_step_{step + 1:03}.png")
            say(f"preview {save(self.palette.picture(values['latents']), path)}")
        return values


@torch.no_grad()
def projection(vae: Any) -> tuple[Tensor, Tensor]:
    """RGB of one unit of each latent channel, and of none: from decoding 4 x 4 constants, two a channel, once."""
    unit = torch.eye(vae.config.latent_channels, device=vae.device, dtype=vae.dtype)
    constants = torch.cat([unit, -unit])[:, :, None, None].expand(-1, -1, 4, 4)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded = vae.decode(constants / vae.config.scaling_factor + shift).sample.float().mean((2, 3))
    plus, minus = decoded.chunk(2)
    return (plus - minus) / 2, decoded.mean(0)
