"""What the UNet and the DiT share: batches, object weighting, the semantic side task, and the caption gates."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fastdiff.bench.scenes import COLOURS, SHAPES

from .data import cell_labels, training_scenes
from .text import tokenize

BATCH = 16
LABEL_CELLS = 8
SIDE_WEIGHT = 0.1
EMPTY_SHARE = 0.1


@dataclass
class Examples:
    """Latents (n, c, 16, 16) with their captions and cell labels (n, 2, 8, 8)."""

    latents: Tensor
    captions: list[str]
    cells: Tensor

    @classmethod
    def load(cls, latents: Tensor) -> Examples:
        count = len(latents)
        return cls(latents, [s.caption for s in training_scenes(count)], cell_labels(count, LABEL_CELLS))

    def tokens(self, tokenizer) -> Tensor:
        return tokenize(tokenizer, self.captions)

    def pick(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index, clean latents, cell labels, and which captions to drop for classifier-free guidance."""
        index = torch.randint(len(self.latents), (BATCH,))
        return index, self.latents[index].float(), self.cells[index].long(), torch.rand(BATCH) < EMPTY_SHARE


@dataclass
class Start:
    """What a denoiser is trained on and from: `warm` is the text encoder that knows scene graphs."""

    folder: Path
    examples: Examples
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    warm: CLIPTextModelWithProjection


def weighted_error(prediction: Tensor, target: Tensor, cells: Tensor) -> Tensor:
    """Squared error in which the cells of an object count three times."""
    objects = F.interpolate((cells[:, :1] > 0).float(), scale_factor=prediction.shape[-1] / cells.shape[-1])
    weight = 1 + 2 * objects
    return ((prediction - target) ** 2 * weight).mean() / weight.mean()


class SideTask(nn.Module):
    """Reads shape and colour of every cell off an inner feature of the denoiser; thrown away after training.

    Aligning inner features with what the clean image shows speeds up training (REPA, arXiv 2410.06940); here the
    renderer's own labels take the place of a pretrained encoder.
    """

    def __init__(self, width: int, module: nn.Module, feature: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.shape, self.colour = nn.Linear(width, len(SHAPES) + 1), nn.Linear(width, len(COLOURS) + 1)
        self.seen: Tensor | None = None
        module.register_forward_hook(lambda _module, _inputs, output: setattr(self, "seen", feature(output)))

    def forward(self, cells: Tensor) -> Tensor:
        """Cross-entropy of the last forward's feature, (b, 64, width), against labels (b, 2, 8, 8)."""
        flat = cells.flatten(2)
        shape, colour = self.shape(self.seen), self.colour(self.seen)
        return F.cross_entropy(shape.mT, flat[:, 0]) + F.cross_entropy(colour.mT, flat[:, 1])


def swapped(captions: list[str], words: list[str]) -> list[str]:
    """Every word of `words` replaced by the one three further on."""
    other = {word: words[(k + 3) % len(words)] for k, word in enumerate(words)}
    pattern = re.compile("|".join(rf"\b{word}\b" for word in words))
    return [pattern.sub(lambda found: other[found[0]], caption) for caption in captions]


def caption_gate(captions: list[str], error: Callable[[list[str]], float]) -> str:
    """How much worse the loss at high noise gets when the caption names other colours or shapes.

    Moves long before the images do: no gap, no obedience.
    """
    right = error(captions)
    colour, shape = (error(swapped(captions, list(words))) for words in (COLOURS, SHAPES))
    return f"swap gaps: colour {colour / right - 1:+.3f} shape {shape / right - 1:+.3f}"
