"""Pruning without training: the analysis of HierarchicalPrune. Paper: https://arxiv.org/abs/2508.04663 (AAAI 2026).

Of that method only what needs no training is here: the sensitivity of each component, the prior on its position, and
the removal of what measures as free. Ours is the repair: what a removed component added to a stream is replaced by a
map of what it was given, fitted in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdiff.affine import Numbers, channel_axis, corrected, decoded, encoded
from fastdiff.anatomy import Anatomy, fingerprint
from fastdiff.errors import BadConfig
from fastdiff.method import Settings
from fastdiff.plans import Each, from_file


class Map(Settings):
    """What takes the place of what a component added to one stream, of `channels`: scale * x + shift, channel by
    channel, plus a map of low rank; all float32 in base64."""

    scale: Numbers = Field(max_length=1_000_000)
    shift: Numbers = Field(max_length=1_000_000)
    down: Numbers | None = Field(None, max_length=20_000_000)
    up: Numbers | None = Field(None, max_length=20_000_000)

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Map:
        down, up = (None, None) if low_rank is None else map(encoded, low_rank)
        return cls(scale=encoded(scale), shift=encoded(shift), down=down, up=up)


class Removal(Settings):
    """A module that is taken out. residual: its output held its input; wrapped: it gave a tuple; axis: the dimension of
    channels, None where the number of dimensions tells."""

    path: str = Field(max_length=500)
    residual: bool
    wrapped: bool
    axis: Literal[1, -1] | None = None
    maps: tuple[Map, ...] = Field(min_length=1, max_length=2)


class Measured(Settings):
    """What leaving out a component does to the denoiser's output, without repair: relative squared error."""

    component: str
    kind: Literal["attention", "feed_forward", "resnet", "block"]
    depth: float
    parameters: int
    error: float
    cost: float = Field(description="error over the position's weight: what is removed first has the least")


class PrunePlan(Settings):
    """What to remove from a model, and all that was measured; a JSON file that a distillation can start from."""

    version: Literal[1] = 1
    denoiser: str = Field(max_length=200, description="class and configuration of the model that was measured")
    removed: tuple[Removal, ...] = ()
    protected: tuple[str, ...] = Field((), description="first blocks, left whole; a distillation freezes them")
    error: float = Field(0.0, ge=0, description="relative squared error of the output on calls not fitted on")
    parameters: int = Field(0, description="parameters that are gone")
    measured: tuple[Measured, ...] = ()

    def check_model(self, anatomy: Anatomy) -> None:
        """Raises BadConfig if the plan was made for another model."""
        found = fingerprint(anatomy)
        if self.denoiser != found:
            raise BadConfig(f"the prune plan was made for {self.denoiser}, this model is {found}; measure this model")

    def install(self, anatomy: Anatomy, put: Callable[[nn.Module, str, nn.Module], None]) -> None:
        """Take out of the denoiser what the plan says; `put` is given a parent, the child's name, and what comes there.

        Raises BadConfig for another model.
        """
        self.check_model(anatomy)
        self.take_out(anatomy.denoiser, put)

    def take_out(self, denoiser: nn.Module, put: Callable[[nn.Module, str, nn.Module], None]) -> None:
        """The same for a denoiser that is known to be the plan's."""
        for removal in self.removed:
            try:
                here = next(denoiser.get_submodule(removal.path).parameters(), torch.empty(()))
            except AttributeError:
                raise BadConfig(f"the prune plan removes {removal.path}, which this model does not have") from None
            parent, _, name = removal.path.rpartition(".")
            device = "cpu" if here.is_meta else here.device
            put(denoiser.get_submodule(parent), name, Removed(removal).to(device))

    def summary(self) -> str:
        paths = ", ".join(removal.path for removal in self.removed) or "nothing"
        return f"removes {paths} ({self.parameters / 1e6:.2f} M parameters); output error {self.error**0.5:.2%}"


class Removed(nn.Module):
    """In the place of a component: gives back its input, or nothing, and the map of what it would have added."""

    def __init__(self, removal: Removal) -> None:
        super().__init__()
        self.residual, self.wrapped, self.streams = removal.residual, removal.wrapped, len(removal.maps)
        self.axis = removal.axis
        for k, fitted in enumerate(removal.maps):
            scale = decoded(fitted.scale)
            self.register_buffer(f"scale{k}", scale)
            self.register_buffer(f"shift{k}", decoded(fitted.shift))
            rows = [None if text is None else decoded(text) for text in (fitted.down, fitted.up)]
            down, up = (None if row is None else row.reshape(-1, len(scale)) for row in rows)
            self.register_buffer(f"down{k}", down)
            self.register_buffer(f"up{k}", up)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Any:
        given = (hidden_states, encoder_hidden_states)[: self.streams]
        made = tuple(self._added(k, x) for k, x in enumerate(given) if x is not None)
        return made if self.wrapped else made[0]

    def _added(self, k: int, x: Tensor) -> Tensor:
        scale, shift, down, up = (getattr(self, f"{name}{k}") for name in ("scale", "shift", "down", "up"))
        axis = channel_axis(x) if self.axis is None else self.axis
        out = corrected(x, scale, shift, axis)
        if down is not None:
            low = (x.movedim(axis, -1).float() @ down.float().T) @ up.float()
            out = out + low.movedim(-1, axis).to(x.dtype)
        return x + out if self.residual else out


PruneOption = Annotated[
    PrunePlan | Each[PrunePlan] | float | None,
    from_file(PrunePlan, "prune plan", "fastdiff quantize -o PLAN.json --set quant.prune=0.03 makes one"),
]
