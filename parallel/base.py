"""What every parallel method shares: its place on the mesh, its time-outs, and when it may use what is old."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from fastdiff.anatomy import Anatomy
from fastdiff.errors import BadConfig

from .codec import Codec
from .mesh import Topology
from .shares import Shared


class ParallelMethod(Shared):
    """A point in split (the mesh) x context (`context`) x freshness (`fresh`) x codec.

    The processes form one mesh of cfg x step x patch; what a method does not name is 1, and what is left of `devices`
    goes to its own axis.
    """

    devices: int | None = Field(None, ge=1, description="processes in all; None takes those that run")
    cfg: Literal[1, 2] = Field(1, description="2 gives each half of classifier-free guidance its own ranks (exact)")
    step: int = Field(1, ge=1, description="ranks that compute different steps at a time (see parastep)")
    warmup_steps: int = Field(4, ge=0, description="steps at the start in which every rank waits for fresh values")
    codec: Codec = Field(
        "raw", description="keys and values on the wire: raw, int8, residual (4 bits), residual2 (2 bits)"
    )
    max_age: int = Field(4, ge=1, description="steps after which a value that a cached layer did not renew is too old")
    vae: bool = Field(False, description="decode by patches too (exact)")
    timeout: float = Field(60.0, gt=0, description="seconds that a rank waits for another")
    on_peer_loss: Literal["raise", "local"] = Field(
        "raise", description="when a rank is lost: raise, or let each that is left finish the image alone"
    )

    attend: ClassVar[Callable[..., Tensor] | None] = None  # what computes split self-attention, if not full attention
    split: ClassVar[Callable[..., Any] | None] = None  # what splits a transformer, if not `split_tokens`
    leave: ClassVar[Callable[..., Any] | None] = None  # what takes away weights that a rank has no use for
    own_axis: ClassVar[str] = "patch"

    @model_validator(mode="after")
    def _whole_mesh(self) -> ParallelMethod:
        if self.devices is not None:
            self.topology(self.devices, 0)
        return self

    @property
    def context(self) -> float | None:
        """The part of a neighbour's rows that attention sees; None for all rows of all ranks."""
        return None

    def fresh(self, index: int, total: int | None = None) -> bool:
        """Whether a step, of so many if that is known, waits for this very step's values of the other ranks."""
        return True

    def whole(self, index: int, total: int | None = None) -> bool:
        """Whether attention sees everything in a step, whatever `context` says."""
        return True

    def last(self, total: int) -> int:
        """The last step of a run that may use what was sent in the step before."""
        return total - 1

    def waits(self, layer: str) -> bool:
        """Whether a layer waits in every step, whatever `fresh` says."""
        return False

    def check_layers(self, anatomy: Anatomy, layers: Sequence[str]) -> None:
        """Raises BadConfig where the settings name a layer that is not among these, which all talk to other ranks."""

    def stretch(self, ranks: int, fresh: bool) -> float:
        """How many times its own computing a rank takes for a step, where others compute before and behind it."""
        return 1.0

    def sharing(self, ranks: int) -> int:
        """How many of so many patch ranks, next to each other, share the heads of attention out among them."""
        return 1

    def topology(self, world: int, rank: int) -> Topology:
        """Raises BadConfig where the axes do not fill the mesh."""
        sizes = {"cfg": self.cfg, "step": self.step, "patch": 1}
        given = self.cfg * (self.step if self.own_axis != "step" or self.step > 1 else 1)
        if world % given:
            raise BadConfig(
                f"parallel.devices = {world} is no multiple of cfg * step = {given}; choose a multiple of it"
            )
        if self.own_axis == "step" and self.step == 1:
            sizes["step"] = world // given
        else:
            sizes["patch"] = world // given
        if sizes["patch"] % (team := self.sharing(sizes["patch"])):
            raise BadConfig(f"parallel.ulysses = {team} does not divide the {sizes['patch']} patch ranks; set it to 1")
        return Topology(**sizes, rank=rank)
