"""Which of a step's calls of a denoiser one is: told by what it is conditioned on, not by the order of calls.

The text (its memory, else its numbers), settings such as skipped layers, the attention processors and hooks in place,
and diffusers' `cache_context` make a branch. Of two calls in a step that are alike in all of these, nothing says which
is which: such calls are to be computed, unless they are given the very same latents, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .anatomy import named, parameters
from .report import UNTOLD

_TEXT = ("encoder_hidden_states", "prompt", "text", "caption", "cap_feats", "pooled", "label", "added_cond", "clip",
         "context", "input_ids", "embeds", "proj_embedding")  # fmt: skip
_MOVES = ("timestep", "mask", "sample", "rotary", "residual")  # parts of names of what changes from step to step
_STEP = {"t", "step", "step_index", "i", "index", "return_dict"}
_UNTOLD_HOOKS = ("offload", "prefetch", "casting", "alignment")  # of diffusers; they come and go, and change nothing
MOST = 16


@dataclass
class _Text:
    """A tensor of a conditioning: where it lay when last seen, and its numbers, in case they move or change."""

    seen: Tensor
    version: int | None
    numbers: Tensor

    @classmethod
    def of(cls, given: Tensor) -> _Text:
        return cls(given, _version(given), given.detach().clone())

    def stays(self, given: Tensor) -> bool:
        """Whether it is the very memory, and nobody wrote to it: no wait for the device."""
        seen = self.seen
        if given.is_meta:
            return given is seen
        alike = self._alike(given) and given.data_ptr() == seen.data_ptr() and given.stride() == seen.stride()
        return alike and self.version is not None and self.version == _version(given)

    def equals(self, given: Tensor) -> bool:
        """Whether it holds the same numbers."""
        return not given.is_meta and self._alike(given) and torch.equal(given, self.numbers)

    def follow(self, given: Tensor) -> None:
        """The same numbers lie elsewhere now."""
        self.seen, self.version = given, _version(given)

    def _alike(self, given: Tensor) -> bool:
        seen = self.seen
        return given.shape == seen.shape and given.dtype == seen.dtype and given.device == seen.device


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class Branches:
    """The conditionings that one denoiser was called with in a run, numbered in the order of their first calls."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._first = parameters(denoiser)[:1]
        self._by_name = named(denoiser)
        self.begin()

    def begin(self) -> None:
        """A new run: everything is forgotten."""
        self._known: list[tuple[Any, list[_Text]]] = []
        self._alike: set[int] = set()
        self._called: list[int] = []
        self._inputs: dict[int, list[Any]] = {}  # what the branches of this step were given, and how often written
        self._before: list[int] = []
        self._attending, self._hooked = _watched(self._denoiser)

    def turn(self) -> None:
        """A new step."""
        self._before, self._called = self._called or self._before, []
        self._inputs = {}

    def of(self, context: str | None, args: tuple, kwargs: Mapping[str, Any]) -> int:
        """The branch of a call; UNTOLD where another call of the same step is like it, and from then on."""
        given = self._by_name(args, dict(kwargs))
        latents = _versions([given.pop(name, None) for name in self._first])
        settings, texts = (context, _settings(given), *self._inside()), _texts(given)
        times, found = 0, self._find((settings, 0), texts)
        while found in self._inputs and _same(self._inputs[found], latents):  # the very same call once more
            times += 1
            found = self._find((settings, times), texts)
        if found in self._called:
            self._alike.add(found)
        if found == UNTOLD or found in self._alike:
            return UNTOLD
        self._called.append(found)
        self._inputs[found] = latents
        return found

    def _find(self, settings: Any, texts: list[Tensor]) -> int:
        alike = [n for n, (known, own) in enumerate(self._known) if known == settings and len(own) == len(texts)]
        for number in alike:
            if all(text.stays(tensor) for text, tensor in zip(self._known[number][1], texts, strict=True)):
                return number
        equal = [n for n in alike if all(map(_Text.equals, self._known[n][1], texts))]
        if len(equal) > 1 or not self._alike.isdisjoint(equal):
            return UNTOLD  # texts that are equal are told by where they lie, and these lie elsewhere
        if equal and equal[0] not in self._called:
            for text, tensor in zip(self._known[equal[0]][1], texts, strict=True):
                text.follow(tensor)
            return equal[0]
        made = settings, [_Text.of(tensor) for tensor in texts]
        grown = self._grown(texts) if not equal else None
        if grown is not None:
            self._known[grown] = made
            return grown
        if len(self._known) == MOST:
            return UNTOLD
        self._known.append(made)
        return len(self._known) - 1

    def _grown(self, texts: list[Tensor]) -> int | None:
        """The branch that had this call's turn in the step before, if what it was given had another shape: a batch
        that lost its half of guidance. What was remembered of it fits no more."""
        turn = len(self._called)
        before = self._before[turn] if turn < len(self._before) else None
        if before is None or before in self._called or before in self._alike:
            return None
        shapes = [text.seen.shape for text in self._known[before][1]]
        return before if shapes != [tensor.shape for tensor in texts] else None

    def _inside(self) -> tuple[Any, ...]:
        """What is set on the modules: processors of attention (PAG), hooks (layers that guiders skip)."""
        hooks = []
        for place, module in enumerate(self._hooked):
            registry = vars(module).get("_diffusers_hook")
            if registry is not None:
                names = [type(hook).__name__ for hook in registry.hooks.values()]
                hooks += [(place, n) for n in names if not any(part in n.lower() for part in _UNTOLD_HOOKS)]
        return tuple(id(module.processor) for module in self._attending), tuple(hooks)


def _versions(inputs: Any) -> list[tuple[Tensor, int | None]]:
    return [(leaf, _version(leaf)) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _same(one: list[tuple[Tensor, int | None]], other: list[tuple[Tensor, int | None]]) -> bool:
    """Whether two calls of a step were given the very same tensors, written to by nobody in between."""
    pairs = [a is b and told is not None and told == now for (a, told), (b, now) in zip(one, other, strict=False)]
    return len(one) == len(other) > 0 and all(pairs)


def _watched(denoiser: nn.Module) -> tuple[list[Any], list[nn.Module]]:
    """Attention layers, and the blocks with their direct parts."""
    attending = [module for module in denoiser.modules() if getattr(module, "processor", None) is not None]
    blocks = [block for part in denoiser.modules() if isinstance(part, nn.ModuleList) for block in part]
    hooked = {id(part): part for block in blocks for part in (block, *block.children())}
    return attending, list(hooked.values())


def _texts(given: Mapping[str, Any]) -> list[Tensor]:
    chosen = (v for name, v in given.items() if _is_text(name))
    return [leaf for value in chosen for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_text(name: str) -> bool:
    return any(part in name for part in _TEXT) and not any(part in name for part in _MOVES)


def _settings(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments that are no tensors: names of blocks to skip, scales of adapters."""
    kept = []
    for name, value in given.items():
        if name in _STEP or any(part in name for part in _MOVES):
            continue
        found = _plain(value, "kwargs" in name or "scale" in name)
        if found is not None:
            kept.append((name, found))
    return tuple(kept)


def _plain(value: Any, scales: bool) -> Any:
    if isinstance(value, bool | int | str) or (scales and isinstance(value, float)):
        return value
    if isinstance(value, list | tuple):
        return tuple(_plain(part, scales) for part in value)
    if isinstance(value, dict):
        return tuple((str(name), _plain(part, scales)) for name, part in value.items())
    return None
