"""Pipelines over the same weights, drawn with in turns: each has layers, a scheduler and caches of its own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.config import Layer
from fastdiff.errors import UnsupportedModel
from fastdiff.pipelines.accelerate import restore
from fastdiff.pipelines.families import denoisers
from fastdiff.pipelines.inputs import fitting
from fastdiff.pipelines.outfit import wear
from fastdiff.quant.layer import QLayer
from fastdiff.studio.drawing import Studio
from fastdiff.timing import Leash


def twin(pipe: Any) -> Any:
    """A copy of a plain pipeline that holds the very same weights, and nothing else that changes."""
    shared: dict[int, Any] = {}
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            kept = [value for module in part.modules() for value in vars(module).values() if isinstance(value, Tensor)]
            shared |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers(), *kept)}
        elif not hasattr(type(part), "set_timesteps"):
            shared[id(part)] = part  # a tokenizer, for one
    try:
        return copy.deepcopy(pipe, shared)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        kind = type(pipe).__name__
        raise UnsupportedModel(
            f"{kind} cannot be drawn with in turns ({why}); serve it with --in-progress 1"
        ) from error


def places(studio: Studio, most: int) -> list[Place]:
    """Those of a server, at most so many. A model whose layers are quantized has one: each would pack them anew."""
    studio.fast.restore()
    layers = (layer for part in denoisers(studio.pipe).values() for layer in part.modules())
    if most == 1 or any(isinstance(layer, QLayer) for layer in layers):
        return [Place(studio, studio.pipe)]
    return [Place(studio, twin(studio.pipe)) for _ in range(most)]


class Place:
    """One pipeline, as the request that is drawn with it wants it."""

    def __init__(self, studio: Studio, plain: Any) -> None:
        self.studio, self._plain = studio.over(plain), plain
        self.ticket: Any = None  # what is drawn with it
        self.leash = Leash()  # a step that the device was given cannot be put behind what is more urgent
        self._settings: tuple[Collection[str], str] | None = None
        self._worn: tuple[str, ...] = ()

    def suits(self, inputs: Collection[str], preset: str, loras: Mapping[str, str]) -> bool:
        """Whether it is already as `suit` would make it."""
        return self._settings == (inputs, preset) and self._worn == tuple(loras.values())

    def suit(
        self, inputs: Collection[str], preset: str, layers: Sequence[Layer], loras: Mapping[str, str]
    ) -> bool:  # fmt: skip
        """Have it draw from these inputs with this preset and these LoRA, named files; says whether it was accelerated
        anew."""
        worn, anew = tuple(loras.values()), self._settings != (inputs, preset)
        if self._worn and (anew or worn != self._worn):
            self._wear(())
        if anew:
            self._settings = None  # until it is done
            restore(self.studio.pipe)
            self.studio = self.studio.over(fitting(self._plain, inputs))
            self.studio.use(layers)
            self._settings = inputs, preset
        if worn != self._worn:
            self._wear(worn)
        self.studio.outfit = {"lora": list(worn)} if worn else {}
        return anew

    def _wear(self, loras: tuple[str, ...]) -> None:
        self._worn = loras  # also where it fails, so that it is taken off
        wear(self.studio.pipe, loras)
