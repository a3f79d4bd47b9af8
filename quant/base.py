"""What every scheme shares: which layers are quantized, and the options of weights and activations."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from fastdiff.method import Method
from fastdiff.plans import own

from .prune import PruneOption
from .recipe import Activations, Recipe, Speed
from .rounding import Rounding

KEPT = (
    "conv_in*", "conv_out*", "*time_emb*", "*time_text_embed*", "*timestep_embed*", "*add_embedding*", "*pos_embed*",
    "*patch_embed*", "x_embedder*", "*context_embedder*", "*norm*", "*adaln*", "proj_out", "final_layer*", "lm_head",
    "*lora_*", "*quant_conv*",
)  # fmt: skip

# Layers that see one vector an image: modulations (AdaLN), and embedders of time, guidance and pooled text.
VECTORS = (
    "*norm*.linear", "*adaln*", "*time_emb*", "*time_text_embed*", "*timestep_embed*", "*add_embedding*",
)  # fmt: skip


Power = Annotated[float, Field(ge=0, le=1)]
VALUES, CHANNELS = 99.999, 99.5  # percentiles of values that ranges hold, and of channels that are not smoothed


class QuantMethod(Method):
    """A scheme: a format of weights, how activations are treated, and the options around them."""

    components: tuple[str, ...] = Field(
        ("denoiser",), min_length=1, description="denoiser, text_encoder, vae, or the name of a component"
    )
    skip: tuple[str, ...] = Field((), description="more layers to leave alone: patterns of their names, *attn2* e.g.")
    keep: tuple[str, ...] = Field(
        KEPT, description="what is left alone by default: first and last layers, embeddings of time, norms"
    )
    vectors: Literal["float", "int8", "int4"] = Field(
        "float", description="modulations and embedders of time, kept or not: their weights alone in so many bits"
    )
    group_size: int = Field(
        64, ge=2, le=4096, multiple_of=2, description="weights that share a scale, of 4-bit formats; even"
    )
    rounding: Rounding = Field("mse", description="how weights are rounded: nearest, mse (clipping search), flexround")
    reconstruct: Literal["layer", "block"] = Field(
        "layer", description="what flexround makes right: the output of each layer, or then of blocks as a whole"
    )
    low_rank: int = Field(0, ge=0, le=512, description="rank of a 16-bit residual of the weight error; no calibration")
    smooth: Power | Literal["percentile"] | None = Field(
        None,
        description="move outliers of the input into the weights: by this power, or percentile, which brings channels "
        "above it down to it (DGQ); needs `ranges`",
    )
    split: bool = Field(False, description="apart ranges for both halves of what a skip connection joins")
    timestep_buckets: int = Field(8, ge=1, le=1000, description="static ranges of the input, by noise level")
    observer: Literal["minmax", "mse", "percentile"] = Field(
        "minmax", description="static ranges: all that was seen, the least error on a sample, or most values"
    )
    percentile: float | None = Field(
        None, gt=50, le=100, description="of values in a range (99.999), or channels not smoothed (99.5); 100 is all"
    )
    ranges: str | None = Field(None, description="file of a calibration; without it ranges are dynamic")
    prune: PruneOption = Field(
        None, description="what is removed before: a plan, the path of its file, or a relative error to plan for"
    )
    protect: float = Field(
        0.0, ge=0, lt=1, description="what prune, a number, leaves whole: this share of each stack's blocks, the first"
    )
    kernel: str = Field("auto", description="auto, or the name of the only kernel that may be used")
    speed: Speed = Field(
        "never slower",
        description="never slower: where the float layer is held and faster, it runs; fastest: also where it must be "
        "made again, and held; smallest: always the quantized layer",
    )

    format: ClassVar[str]
    activations: ClassVar[Activations] = "none"

    @field_validator("prune", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ValueError(f"prune = {value} is no relative error: give one between 0 and 1, 0.03 say, or a plan")
        return value

    @field_validator("ranges", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _together(self) -> QuantMethod:
        if self.observer == "percentile" and (self.smooth is not None or self.split):
            raise ValueError(
                "observer = percentile counts values as they are, before smooth or split: leave those out, or take "
                "observer = minmax"
            )
        if self.percentile is not None and "percentile" not in (self.observer, self.smooth):
            raise ValueError(
                f"percentile = {self.percentile:g} is of observer = percentile or smooth = percentile: set one"
            )
        if self.reconstruct == "block" and (self.rounding != "flexround" or self.low_rank):
            raise ValueError(
                "reconstruct = block is of rounding = flexround, without low_rank: set that, or leave it out"
            )
        if self.protect and not isinstance(self.prune, float):
            raise ValueError(f"protect = {self.protect:g} needs prune = 0.03, say; leave it out (plans have their own)")
        return self

    def of(self, component: str, main: bool) -> QuantMethod | None:
        """The method with what it planned for this component; None where it must be planned, and was not.

        main: whether it is the first denoiser, for which a single plan is.
        """
        if isinstance(self.prune, float):
            return self
        return self.model_copy(update={"prune": own(self.prune, component, main)})

    def weight_format(self) -> str:
        """The format of all layers that have no recipe of their own."""
        return self.format

    def recipe(self, name: str, layer: nn.Module) -> Recipe | None:
        """How to quantize the layer of this name, a Linear or Conv2d; None leaves it as it is.

        `mixed` gives each layer its own.
        """
        alone = self._alone(name)
        return Recipe(
            self.vectors if alone else self.weight_format(), "none" if alone else self.activations, self.group_size,
            self.rounding, self.low_rank, self.kernel, self.speed,
        )  # fmt: skip

    def _alone(self, name: str) -> bool:
        """Whether of a layer the weights alone are quantized, whatever the scheme."""
        return self.vectors != "float" and _named(name, VECTORS)

    def takes(self, name: str) -> bool:
        """Whether the layer of this name may be quantized."""
        return not _named(name, self.skip) and (self._alone(name) or not _named(name, self.keep))


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
