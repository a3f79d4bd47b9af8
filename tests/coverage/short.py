"""Pipelines of the zoo with fewer layers, for tests that trace a denoiser: that takes a second for each layer."""

from __future__ import annotations

from dataclasses import replace

from diffusers import DiffusionPipeline
from torch import nn

from tests.zoo import ZOO
from tests.zoo_entry import Entry
from tests.zoo_unets import small_unet


def _short(name: str, deep: str, **kept: tuple[int, ...]) -> Entry:
    """A pipeline of the zoo with these blocks of its stacks."""

    def build() -> DiffusionPipeline:
        pipe = ZOO[name].make()
        for path, places in kept.items():
            stack = getattr(pipe.transformer, path)
            setattr(pipe.transformer, path, nn.ModuleList(stack[place] for place in places))
        return pipe

    return replace(ZOO[name], build=build, deep=deep)


def _short_unet() -> DiffusionPipeline:
    pipe = ZOO["sd2"].make()
    pipe.unet = small_unet(use_linear_projection=True, attention_head_dim=(2, 4), layers_per_block=1)
    return pipe


# One layer of each kind, and two where a step may leave out all but the first.
SHORT = {
    "sd2": replace(ZOO["sd2"], build=_short_unet),
    "sd3": _short("sd3", "transformer.transformer_blocks.1.ff.net.2", transformer_blocks=(0, -1)),
    "pixart": _short("pixart", "transformer.transformer_blocks.1.ff.net.2", transformer_blocks=(0, -1)),
    "wan": _short("wan", "transformer.blocks.1.ffn.net.2", blocks=(0, -1)),
    "flux": _short(
        "flux", "transformer.single_transformer_blocks.1.proj_out", transformer_blocks=(0, -1),
        single_transformer_blocks=(0, -1),
    ),
}  # fmt: skip
