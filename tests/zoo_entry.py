"""What the zoo knows of a pipeline class, and the made-up prompts and pictures its pipelines are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests import tiny

Arguments = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One pipeline class on tiny random weights.

    build: makes the pipeline. arguments: of a call, without steps and generator.
    deep: path of a layer in the innermost or last block; it runs once in each full computation of the denoiser.
    calls: denoiser calls in a step. listed: steps to ask for to have one executed (img2img runs a part of them).
    method: what caches by structure, "deepcache" or "first_block"; "" where no stack can be described.
    """

    build: Callable[[], DiffusionPipeline]
    arguments: Arguments
    deep: str
    method: str
    calls: int = 1
    listed: int = 1

    def make(self) -> DiffusionPipeline:
        """A fresh pipeline; the same weights each time."""
        return tiny.twin(_built(self.build))

    def run(self, pipe: DiffusionPipeline, steps: int, **overrides: Any) -> Tensor:
        """The result of one call that executes `steps` steps."""
        told = {"num_inference_steps": steps * self.listed, "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipe(**(self.arguments() | told | overrides))[0])

    def denoiser(self, pipe: DiffusionPipeline) -> nn.Module:
        return getattr(pipe, self.deep.partition(".")[0])

    def deepest_leaf(self, pipe: DiffusionPipeline) -> nn.Module:
        return self.denoiser(pipe).get_submodule(self.deep.partition(".")[2])


@cache
def _built(build: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 64) -> Tensor:
    """An image in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def text(
    width: int, *, mask: str = "", negative: bool = True, tokens: int = 7, dtype: torch.dtype = torch.long
) -> dict[str, Tensor]:
    """Embeddings of a prompt that no text encoder needs to make; `mask` names their attention mask, of `dtype`.

    Seven tokens: no picture has so many, so that streams can be told apart by shape.
    """
    told = {"prompt_embeds": noise(1, tokens, width, seed=1)}
    if negative:
        told["negative_prompt_embeds"] = noise(1, tokens, width, seed=2)
    masks = {"negative_" * n + mask: torch.ones(1, tokens, dtype=dtype) for n in range(1 + negative) if mask}
    return told | masks


def latent(size: int = 64, **more: Any) -> dict[str, Any]:
    """Arguments of a call that ends in latents."""
    return {"output_type": "latent", "guidance_scale": 4.0, "height": size, "width": size} | more
