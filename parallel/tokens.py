"""A transformer split by tokens: what comes before and after its blocks runs whole, the blocks on a share each.

Position embeddings are those of the whole picture, cut like the tokens. Text tokens are on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, Stack, named
from fastdiff.clock import StepClock
from fastdiff.errors import UnsupportedModel
from fastdiff.patch import PatchSet

from .attention import split_attention
from .base import ParallelMethod
from .bus import Bus
from .halves import in_halves
from .heads import check_heads
from .split import Split, around

# parts of the names of block arguments that hold a value for each token
PLACES = ("rotary", "rope", "freqs")


class Tokens:
    """Layout of a transformer's attention: contiguous tokens, rows of the picture where they are known."""

    def __init__(self, split: Split, anatomy: Anatomy) -> None:
        self.split, self.kind = split, anatomy.family.tokens
        self.text_first = self.kind == "text_first"
        self.text_tokens = 0
        self._rows: dict[torch.Size, int] = {}  # tokens in a row, by the shape of a list of places
        split.at_reset(self._rows.clear)

    @property
    def keys(self) -> int | None:
        return None if self.text_first else self.split.parts[-1][1] + self.text_tokens

    def counts(self, own: int) -> list[int]:
        return [end - begin for begin, end in self.split.parts]

    def edge(self, place: int, count: int, portion: float) -> int:
        row = self.split.width
        return min(count, math.ceil(portion * count / row) * row)

    def text(self, keys: int) -> int:
        begin, end = self.split.parts[self.split.place]
        text = keys - (end - begin)
        if text not in (0, self.text_tokens):
            raise UnsupportedModel(
                f"{keys} keys are not {end - begin} tokens of the picture with or without the text's"
            )
        return text

    def row(self, total: int) -> int:
        """Tokens in a row of the picture, of latents (batch, channels, [frames,] height, width) or from Flux' list of
        places, which is read once a run; 1 where neither tells."""
        latents = self.split.latents
        places = latents.get("img_ids")
        if isinstance(places, Tensor):
            if places.shape not in self._rows:
                self._rows[places.shape] = int(places[..., -1].max()) + 1
            return self._rows[places.shape]
        sample = next((leaf for leaf in latents.values() if isinstance(leaf, Tensor)), None)
        if sample is None or sample.ndim < 4:
            return 1
        frames = sample.shape[2] if sample.ndim == 5 else 1
        return max(1, round(sample.shape[-1] / math.sqrt(frames * sample.shape[-2] * sample.shape[-1] / total)))

    def crosses(self, given: dict[str, Any]) -> bool:
        return self.kind == "apart" and given.get("encoder_hidden_states") is not None

    def timed(self, total: int) -> bool:
        """Whether each token has a time of its own (a first frame that is given)."""
        return getattr(self.split.latents.get("timestep"), "shape", ())[1:2] == (total,)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's share of an argument that has a value for each token; others as they are."""
        total, (begin, end) = self.split.parts[-1][1], self.split.parts[self.split.place]
        places = any(part in name for part in PLACES) or (name == "temb" and self.timed(total))
        for dim, size in enumerate(tensor.shape if places else ()):
            if size == total:
                return tensor.narrow(dim, begin, end - begin)
            if self.text_tokens and size == total + self.text_tokens:
                shift = self.text_tokens if self.text_first else 0
                image = tensor.narrow(dim, shift + begin, end - begin)
                text = tensor.narrow(dim, 0 if self.text_first else total, self.text_tokens)
                return torch.cat([text, image] if self.text_first else [image, text], dim)
        return tensor


def split_tokens(
    method: ParallelMethod, anatomy: Anatomy, bus: Bus, clock: StepClock, patches: PatchSet
) -> Callable[[PatchSet], None]:
    """Patch what is inside the blocks; the function that is returned patches the blocks themselves, outside of what
    may lie between (a cache). Raises UnsupportedModel, with the reason, before anything is patched."""
    blocks, family = anatomy.blocks, anatomy.family
    if family.tokens is None or not blocks:
        raise UnsupportedModel(
            f"where the tokens of a {family.name} lie in its attention is not described; cfg and parastep work on any "
            "model (Family.tokens = apart, text_first or text_last describes it)"
        )
    if method.split is not None:
        return method.split(method, anatomy, bus, clock, patches)
    split = Split(method, bus, clock)
    layout = Tokens(split, anatomy)
    check_heads(blocks, method.sharing(len(split.ranks)), method.method)
    root_by_name = named(anatomy.denoiser)

    def seen(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        split.parts = []
        split.rules(lambda: _rules(split, anatomy, layout, patches))
        split.latents = root_by_name(args, kwargs)
        return args, kwargs

    def outside(patches: PatchSet) -> None:
        for block in blocks:
            stack = anatomy.stack_of(block)
            _block(split, layout, block, stack, block is blocks[0], block is blocks[-1], patches)

    _rules(split, anatomy, layout, patches)
    split.belongs_to(anatomy)
    patches.wrap_forward(anatomy.denoiser, lambda forward: around(split, in_halves(split, anatomy, forward), seen))
    return outside


def _rules(split: Split, anatomy: Anatomy, layout: Tokens, patches: PatchSet) -> None:
    names = {id(module): name for name, module in anatomy.denoiser.named_modules()}
    for block in anatomy.blocks:
        split_attention(split, block, layout, patches, prefix=f"{names[id(block)]}.")


def _block(
    split: Split, layout: Tokens, block: nn.Module, stack: Stack, first: bool, last: bool, patches: PatchSet
) -> None:
    by_name = named(block)

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def block_forward(*args: Any, **kwargs: Any) -> Any:
            if not split.active:
                return forward(*args, **kwargs)
            given = by_name(args, kwargs)
            if first:
                image = given[stack.takes[0]]
                _share_out(split, layout, image, given, stack)
                begin, end = split.parts[split.place]
                given[stack.takes[0]] = image[:, begin:end].contiguous()  # as later blocks' are: one graph for all
            for key in given.keys() - set(stack.takes):
                given[key] = pytree.tree_map_only(Tensor, partial(layout.cut, key), given[key])
            if "num_tokens" in given:  # of the first frame, which is given
                begin, end = split.parts[split.place]
                given["num_tokens"] = min(max(given["num_tokens"] - begin, 0), end - begin)
            output = forward(**given)
            return _whole(split, stack, output) if last else output

        return block_forward

    patches.wrap_forward(block, wrapper)


def _share_out(split: Split, layout: Tokens, image: Tensor, given: dict[str, Any], stack: Stack) -> None:
    total, ranks, split.shape = image.shape[1], len(split.ranks), tuple(image.shape)
    split.width = layout.row(total)
    if total < ranks:
        raise UnsupportedModel(f"{total} tokens cannot be split over {ranks} patch ranks; draw a larger picture")
    rows, rest = divmod(total, split.width)
    if rest or rows < ranks:
        split.width, rows = 1, total
    split.parts = [(begin * split.width, end * split.width) for begin, end in split.bus.speeds.cut(rows, ranks)]
    joint = layout.kind != "apart" and len(stack.takes) > 1
    layout.text_tokens = given[stack.takes[1]].shape[1] if joint and given.get(stack.takes[1]) is not None else 0


def _whole(split: Split, stack: Stack, output: Any) -> Any:
    """The last block's output with the tokens of all ranks."""
    if isinstance(output, Tensor):
        return split.whole(output, 1)
    place = stack.returns.index(stack.takes[0])
    return tuple(split.whole(part, 1) if k == place else part for k, part in enumerate(output))
