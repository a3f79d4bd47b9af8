"""Self-attention of split tokens: the model's own processor runs, and finds more keys and values than its own.

The call of scaled_dot_product_attention is where every stock processor ends, after rotary embeddings and norms of
queries and keys: what arrives there is what has to be exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff.anatomy import named
from fastdiff.errors import UnsupportedModel
from fastdiff.patch import PatchSet

from .exchange import Exchange
from .split import Split


class Layout(Protocol):
    """How the tokens of one attention call lie on the patch ranks."""

    text_first: bool

    @property
    def keys(self) -> int | None:
        """Keys that a mask of keys is for, the picture's of all ranks and then the text's; None takes no mask."""

    def counts(self, own: int) -> list[int]:
        """Tokens of each patch rank at a layer where this rank has `own`."""

    def edge(self, place: int, count: int, portion: float) -> int:
        """How many of a rank's `count` tokens a neighbour is shown: whole rows."""

    def text(self, keys: int) -> int:
        """How many of an attention call's keys are of the text, which every rank has."""

    def crosses(self, given: dict[str, Any]) -> bool:
        """Whether an attention call looks at the text alone."""


def split_attention(split: Split, root: nn.Module, layout: Layout, patches: PatchSet, prefix: str = "") -> None:
    for name, module in root.named_modules():
        if is_attention(module) and split.once(module, "attention"):
            _attention(split, prefix + name, module, layout, patches)


def is_attention(module: Any) -> bool:
    return any(hasattr(module, part) for part in ("to_q", "to_qkv")) and hasattr(module, "processor")


def _attention(split: Split, name: str, module: nn.Module, layout: Layout, patches: PatchSet) -> None:
    exchange, by_name = split.exchange(name, "kv"), named(module)
    talk = split.hidden(lambda shape, *call, **options: _attend(split, exchange, layout, *call, **options))

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def attention_forward(*args: Any, **kwargs: Any) -> Any:
            if not split.active:
                return forward(*args, **kwargs)
            if layout.crosses(by_name(args, kwargs)):
                return forward(*args, **kwargs)
            done: list[bool] = []

            def attend(
                query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any
            ) -> Tensor:
                done.append(True)
                return talk((*query.shape[:-1], value.shape[-1]), query, key, value, attn_mask=attn_mask, **how)

            with Intercept(attend):
                output = forward(*args, **kwargs)
            if not done:
                raise UnsupportedModel(
                    f"{name} attends without torch's scaled_dot_product_attention (processor "
                    f"{type(module.processor).__name__}); patches need it: set attention.backend = native"
                )
            return output

        return attention_forward

    patches.wrap_forward(module, wrapper)


class Intercept(TorchFunctionMode):
    """Puts another function in the place of scaled_dot_product_attention while one layer runs."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.unflatten and torch.compiler.is_compiling():  # the only one whose own code cannot be traced
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))


def _attend(
    split: Split, exchange: Exchange, layout: Layout,
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """query, key, value: (batch, heads, tokens, channels) of this rank's tokens, and the text's in joint attention."""
    if attn_mask is not None and attn_mask.shape[1:] != (1, 1, layout.keys):
        raise UnsupportedModel(f"{exchange.layer} masks its self-attention by more than keys, which cannot be split")
    text = layout.text(key.shape[-2])
    begin = text if layout.text_first else 0
    own = slice(begin, begin + key.shape[-2] - text)
    if split.method.attend is not None:
        return split.method.attend(split, exchange, layout, own, query, key, value, options | {"attn_mask": attn_mask})
    both = torch.cat([key[..., own, :], value[..., own, :]], -1)
    parts = _context(split, exchange, layout, both)
    keys = [part[..., : key.shape[-1]] for part in parts]
    values = [part[..., key.shape[-1] :] for part in parts]
    rest = [slice(0, own.start), slice(own.stop, key.shape[-2])]
    key = torch.cat([*keys, *(key[..., piece, :] for piece in rest)], -2)
    value = torch.cat([*values, *(value[..., piece, :] for piece in rest)], -2)
    if attn_mask is not None:
        if key.shape[-2] != layout.keys:
            raise UnsupportedModel(f"{exchange.layer} masks its keys, of which {split.method.method} has only a part")
        masks = attn_mask.split([*layout.counts(own.stop - own.start), text], -1)
        attn_mask = torch.cat([masks[split.place], *masks[: split.place], *masks[split.place + 1 :]], -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def _context(split: Split, exchange: Exchange, layout: Layout, own: Tensor) -> list[Tensor]:
    """Keys and values that this rank may see: of all ranks, or of parts of its neighbours where the method says so."""
    counts = layout.counts(own.shape[-2])
    seen = split.step is not None and split.method.whole(split.step.index, split.step.run.total)
    portion = None if seen else split.method.context
    if portion is None:
        shapes = {rank: (*own.shape[:-2], counts[k], own.shape[-1]) for k, rank in enumerate(split.ranks)}
        shapes.pop(split.bus.topology.rank)
        own = own.contiguous()
        got = split.swap(exchange, dict.fromkeys(split.peers, own), shapes, own.dtype)
        return [own, *got.values()]
    sends, shapes = {}, {}
    mine = layout.edge(split.place, counts[split.place], portion)
    for offset in (-1, 1):
        peer = split.neighbour(offset)
        if peer is None:
            continue
        theirs = layout.edge(split.place + offset, counts[split.place + offset], portion)
        if mine:
            sends[peer] = own[..., :mine, :] if offset < 0 else own[..., own.shape[-2] - mine :, :]
        if theirs:
            shapes[peer] = (*own.shape[:-2], theirs, own.shape[-1])
    everything = portion == 1 and len(counts) == 2  # as after the steps that see all
    return [own, *split.swap(exchange, sends, shapes, own.dtype, whole=everything).values()]
