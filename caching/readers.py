"""Loops that look inside the denoiser: what they read there, a cached step would not make.

Self-attention guidance keeps attention maps, feature injection puts values in. A hook that a loop sets itself, and an
attention processor that keeps things, are such readers; hooks that were there before are told that they are passed by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_STOCK = ("diffusers.models.", "diffusers.hooks.", "fastdiff.", "peft.", "torch.", "xformers.")


class Readers:
    """Watches the modules that a cached step leaves out."""

    def __init__(self, units: Iterable[nn.Module]) -> None:
        self._units = list(units)
        self._before: set[int] | None = None

    def expect(self) -> None:
        """A loop is about to begin: the hooks of now are none of its own."""
        self._before = set(self._hooks())

    def found(self) -> str | None:
        """Why the run that begins has to be computed; None if nothing reads inside."""
        if self._before is not None and not self._before.issuperset(self._hooks()):
            return "everything is computed: the loop has set hooks inside the denoiser and reads there"
        kept = sorted({type(p).__name__ for p in self._processors() if _keeps(p)})
        if kept:
            return f"everything is computed: attention processors ({', '.join(kept)}) keep what they see for the loop"
        return None

    def _modules(self) -> Iterable[nn.Module]:
        for unit in self._units:
            yield from unit.modules()

    def _hooks(self) -> list[int]:
        return [
            id(hook)
            for module in self._modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if not str(getattr(hook, "__module__", "")).startswith(_STOCK)
        ]

    def _processors(self) -> Iterable[Any]:
        for module in self._modules():
            processor = getattr(module, "processor", None)
            if processor is not None:
                yield processor


def _keeps(processor: Any) -> bool:
    """Whether an attention processor is of a pipeline's own, or holds what is neither a number nor a weight."""
    kind = type(processor)
    if ".pipelines." in kind.__module__:
        return True
    if isinstance(processor, nn.Module) or f"{kind.__module__}.".startswith(_STOCK):
        return False
    plain = (int, float, str, bool, Tensor, nn.Module, type(None), tuple)
    return not all(isinstance(value, plain) for value in getattr(processor, "__dict__", {}).values())
