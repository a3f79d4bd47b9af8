"""A denoiser described as data: what the rooms may know of a model without naming its class."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
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


# parts of the names of inputs that hold places, not images
NO_BATCH = ("rotary", "rope", "freqs", "grid", "img_ids", "txt_ids")
JOINT = {"takes": ("hidden_states", "encoder_hidden_states"), "returns": ("encoder_hidden_states", "hidden_states")}


@dataclass(frozen=True)
class Family:
    """What is known of a model family.

    kind: "unet" has `conv_in, down_blocks, mid_block, up_blocks`; "transformer" has `stacks`; "language" takes tokens.
    split: dimensions of the latent input that may be split across devices.
    guidance: how classifier-free guidance reaches the denoiser.
    batches: whether every input of the denoiser that belongs to an image has the batch first.
    long_skips: whether blocks are given what much earlier blocks gave.
    tokens: where the text is in the attention of a transformer's blocks: "apart" (in cross-attention, or in one stream
    with the picture), or before or after the picture's tokens in joint attention; None if that is not known.
    latents: name of the argument that holds the noisy latents; "" where the name of the first one tells.
    closed: why no stack can say what is inside; methods that leave out the whole denoiser work nevertheless.
    defaults: fields of methods that suit this family, by method name; the weakest layer of a config.
    """

    name: str
    kind: Literal["unet", "transformer", "language"]
    stacks: tuple[Stack, ...] = ()
    split: tuple[str, ...] = ("height", "width")
    guidance: Literal["batch", "calls", "none"] = "batch"
    batches: bool = True
    long_skips: bool = False
    tokens: Literal["apart", "text_first", "text_last"] | None = None
    latents: str = ""
    closed: str = ""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_WHOLE = "take a method that leaves out the whole model, such as ab_cache"


@dataclass(frozen=True)
class Anatomy:
    """A live denoiser with its family. `recognised` is False where nobody described it: its structure was guessed, or
    nothing is known of its inside. `companions` are modules whose output the denoiser is given at each step, a
    ControlNet for example."""

    denoiser: nn.Module
    family: Family
    component: str
    recognised: bool = True
    companions: tuple[nn.Module, ...] = ()

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

    @property
    def opaque(self) -> bool:
        """Whether nothing is known of the inside: no stack, and no parts of a UNet."""
        return self.family.kind == "transformer" and not self.family.stacks

    def without(self, need: str, instead: str = _WHOLE) -> UnsupportedModel:
        """The refusal of what needs something that this denoiser does not have, or that nobody told of it; `instead`
        says what to do."""
        name = self.family.name
        if self.recognised or not self.opaque:
            why = f": {self.family.closed}" if self.family.closed else ""
            return UnsupportedModel(f"{name} has no {need}{why}; {instead}")
        return UnsupportedModel(
            f"{name} is not described: nobody told fastdiff of its {need}; {instead}, or describe it:\n\n"
            + stub(self.denoiser)
        )


def parameters(module: nn.Module) -> list[str]:
    """Names of what a module's forward takes, in order; of the one inside, where torch.compile has wrapped it."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return list(inspect.signature(type(inner).forward).parameters)[1:]


def named(module: nn.Module) -> Callable[[tuple, dict], dict[str, Any]]:
    """Turns the arguments of a module's forward into a dict by name."""
    order = parameters(module)

    def by_name(args: tuple, kwargs: dict) -> dict[str, Any]:
        return dict(zip(order, args, strict=False)) | kwargs

    return by_name


def recognise(denoiser: nn.Module, component: str, families: Mapping[str, Family]) -> Anatomy:
    """The anatomy of a denoiser: by class name along its bases, else by structure, else of a closed box."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in families:
            return Anatomy(denoiser, families[cls.__name__], component)
    name = type(denoiser).__name__
    if _is_unet(denoiser):
        return Anatomy(denoiser, Family(name, "unet"), component, recognised=False)
    lists = _lists(denoiser)
    stack = _stack(*lists[0]) if len(lists) == 1 else None
    known = Family(name, "transformer", (stack,)) if stack else Family(name, "transformer", batches=False)
    return Anatomy(denoiser, known, component, recognised=False)


def _is_unet(denoiser: Any) -> bool:
    parts = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
    return all(hasattr(denoiser, part) for part in parts) and all(
        hasattr(block, "resnets") for block in (*denoiser.down_blocks, *denoiser.up_blocks)
    )


def _lists(denoiser: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """What may be a stack. Of two, nothing tells the order, nor whether their blocks take turns."""
    return [(n, m) for n, m in denoiser.named_children() if isinstance(m, nn.ModuleList) and len(m) > 1]


def _stack(name: str, blocks: nn.ModuleList) -> Stack | None:
    """A list of blocks that all carry `hidden_states` and return it alone; anything else needs a description."""
    arguments = list(inspect.signature(blocks[0].forward).parameters)
    alone = "hidden_states" in arguments and "encoder_hidden_states" not in arguments
    return Stack(name) if alone else None


def stub(denoiser: nn.Module) -> str:
    """A description to paste and complete."""
    name = type(denoiser).__name__
    lists = []
    for path, blocks in _lists(denoiser):
        takes = _takes(blocks[0])
        streams = f"takes=({_quoted(takes)}), returns=({_quoted(_returns(blocks[0], takes))})"
        lists.append(f'        Stack("{path}", {streams}),  # check the order')
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


def _takes(block: nn.Module) -> tuple[str, ...]:
    arguments = list(inspect.signature(block.forward).parameters)
    known = ("hidden_states", "encoder_hidden_states")
    return tuple(a for a in arguments if a in known) or tuple(arguments[:1])


def _returns(block: nn.Module, takes: tuple[str, ...]) -> tuple[str, ...]:
    """The streams that the source of a block returns, where it names them; good enough to propose, not to go by."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(block).forward)))
    except (OSError, TypeError, SyntaxError):  # no source to read
        return takes[:1]
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
    found = {tuple(map(ast.unparse, v.elts if isinstance(v, ast.Tuple) else [v])) for v in values}
    return next((names for names in found if len(found) == 1 and set(names) <= set(takes)), takes[:1])


def _quoted(names: tuple[str, ...]) -> str:
    return "".join(f'"{name}", ' for name in names).rstrip()


def fingerprint(anatomy: Anatomy) -> str:
    """Class and configuration of a denoiser: what tells a plan's model from another.

    Adapters, quantization, fine-tuning and a newer diffusers, which adds settings with defaults, do not change it.
    """
    kind = type(anatomy.denoiser)
    usual = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    given = dict(getattr(anatomy.denoiser, "config", None) or {})
    kept = {k: v for k, v in given.items() if not k.startswith("_") and _plain(v) != _plain(usual.get(k, ...))}
    digest = hashlib.sha256(_plain(dict(sorted(kept.items()))).encode()).hexdigest()[:12]
    return f"{kind.__name__} {digest}"


def _plain(value: Any) -> str:
    """Text in which lists and tuples, which saving turns into each other, are the same."""
    return json.dumps(value, sort_keys=True, default=str)
