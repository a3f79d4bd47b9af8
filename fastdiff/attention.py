"""The settings of attention: which kernel computes it, and which pairs of tokens it leaves out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .method import Settings

MIN_TOKENS = 2048  # from which `keep` paid in every round: benchmarks/sparse-attention.json
_OWN = {"radial": {"decay"}, "sparge": {"keep", "mass", "similarity", "interval"}}


class Attention(Settings):
    """Which attention kernel the denoiser uses, and, with `sparse`, which blocks of its keys each block of its queries
    leaves out."""

    backend: str | None = Field(None, description="a backend of diffusers' dispatcher, or xformers; None leaves it")
    sparse: Literal["radial", "sparge"] | None = Field(
        None,
        description="block-sparse self-attention: radial (by distance in frames and space, for video) or sparge (by "
        "the means of blocks); None is dense",
    )
    block: int = Field(
        128, ge=1, le=1024, description="tokens in a block of sparse attention; on CUDA a multiple of 128"
    )
    decay: float = Field(0.95, gt=0, description="radial: width of the window, in parts of a frame's tokens")
    keep: float | None = Field(None, gt=0, le=1, description="sparge: share of the blocks of keys; 0.25 without mass")
    mass: float | None = Field(None, gt=0, le=1, description="sparge: keep the fewest blocks of so much attention")
    similarity: float = Field(
        0.0, ge=0, le=1, description="sparge: blocks of tokens less alike (mean cosine) are always computed"
    )
    interval: int = Field(1, ge=1, description="sparge: steps for which the choice of blocks is kept")
    warmup_steps: int = Field(0, ge=0, description="steps at the start with dense attention")
    cooldown_steps: int = Field(0, ge=0, description="steps at the end with dense attention")
    dense_layers: int = Field(0, ge=0, description="first blocks, of a UNet attention layers, that stay dense")
    min_tokens: int = Field(
        MIN_TOKENS, ge=1, description="shorter attention stays dense: on a CPU it did not get faster"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Attention:
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default} - {"backend", "sparse"}
        others: set[str] = set().union(*(own for name, own in _OWN.items() if name != self.sparse))
        idle = sorted(given if self.sparse is None else given & others)
        if idle:
            raise ValueError(f"attention.sparse = {self.sparse or 'None'} has no use for {', '.join(idle)}")
        if self.keep is not None and self.mass is not None:
            raise ValueError("attention.keep and attention.mass both say how many blocks are kept; leave out one")
        if self.sparse and self.backend not in (None, "native"):
            raise ValueError(
                f"sparse attention takes the place of torch's scaled_dot_product_attention, which the backend "
                f"{self.backend} does not call; leave out attention.backend"
            )
        return self
