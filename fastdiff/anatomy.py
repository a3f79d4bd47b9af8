"""A denoiser described as data: what the rooms may know of a model without naming its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from .errors import UnsupportedModel


@dataclass(frozen=True)
class Stack:
    """A ModuleList of transformer blocks that run one after another.

    `takes` names the arguments that carry the streams through the blocks, `returns` the streams in the order in which
    a block returns them; a block that returns one bare tensor returns `takes[0]`.
    """

    path: str
    takes: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ("hidden_states",)


JOINT = {"takes": ("hidden_states", "encoder_hidden_states"), "returns": ("encoder_hidden_states", "hidden_states")}


@dataclass(frozen=True)
class Family:
    """What is known of a model family.

    kind: "unet" has `conv_in, down_blocks, mid_block, up_blocks`; "transformer" has `stacks`.
    split: dimensions of the latent input that may be split across devices.
    guidance: how classifier-free guidance reaches the denoiser.
    defaults: fields of methods that suit this family, by method name; the weakest layer of a config.
    """

    name: str
    kind: Literal["unet", "transformer"]
    stacks: tuple[Stack, ...] = ()
    split: tuple[str, ...] = ("height", "width")
    guidance: Literal["batch", "calls", "none"] = "batch"
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Anatomy:
    """A live denoiser with its family. `recognised` is False where the structure was guessed."""

    denoiser: nn.Module
    family: Family
    component: str
    recognised: bool = True

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks in call order, stack after stack."""
        return [block for stack in self.family.stacks for block in self._list(stack)]

    def _list(self, stack: Stack) -> nn.ModuleList:
        return cast(nn.ModuleList, self.denoiser.get_submodule(stack.path))

    def stack_of(self, block: nn.Module) -> Stack:
        for stack in self.family.stacks:
            if any(block is member for member in self._list(stack)):
                return stack
        raise UnsupportedModel(f"{type(block).__name__} is in no block stack of {self.family.name}")


def recognise(denoiser: nn.Module, component: str, families: Mapping[str, Family]) -> Anatomy:
    """The anatomy of a denoiser: by class name along its bases, else by structure, else UnsupportedModel."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in families:
            return Anatomy(denoiser, families[cls.__name__], component)
    if all(hasattr(denoiser, part) for part in ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")):
        return Anatomy(denoiser, Family(type(denoiser).__name__, "unet"), component, recognised=False)
    stacks = tuple(stack for name, child in denoiser.named_children() if (stack := _stack(name, child)))
    if stacks:
        return Anatomy(denoiser, Family(type(denoiser).__name__, "transformer", stacks), component, recognised=False)
    raise UnsupportedModel(
        f"{type(denoiser).__name__} is not described and has no block stack that fastdiff recognises. Describe it:\n\n"
        + stub(denoiser)
    )


def _stack(name: str, child: nn.Module) -> Stack | None:
    """A list of blocks that all carry `hidden_states` and return it alone; anything else needs a description."""
    if not isinstance(child, nn.ModuleList) or len(child) < 2:
        return None
    arguments = list(inspect.signature(child[0].forward).parameters)
    alone = "hidden_states" in arguments and "encoder_hidden_states" not in arguments
    return Stack(name) if alone else None


def stub(denoiser: nn.Module) -> str:
    """A description to paste and complete."""
    name = type(denoiser).__name__
    lists = [
        f'        Stack("{path}", takes=({_arguments(child)}), returns=("hidden_states",)),  # check the order'
        for path, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 1
    ]
    return "\n".join(
        [
            "from fastdiff.anatomy import Family, Stack",
            "from fastdiff.pipelines import register_family",
            "",
            f'register_family("{name}", Family(',
            f'    "{name.lower()}", "transformer",',
            "    stacks=(",
            *(lists or ['        Stack("<path of the ModuleList that holds the blocks>"),']),
            "    ),",
            "))",
        ]
    )


def _arguments(blocks: nn.ModuleList) -> str:
    known = ("hidden_states", "encoder_hidden_states")
    found = [a for a in inspect.signature(blocks[0].forward).parameters if a in known]
    return "".join(f'"{a}", ' for a in found or ["hidden_states"]).rstrip()
