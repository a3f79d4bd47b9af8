"""A denoiser's batch: which of its arguments hold it, told by their names and never by a size that coincides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .anatomy import NO_BATCH, Anatomy, named, parameters

# Arguments, and keys of arguments that are dicts, whose tensors have a row for each image first; so has the first one.
BY_ROW = frozenset({
    "hidden_states", "sample", "encoder_hidden_states", "encoder_hidden_states_1", "encoder_hidden_states_2",
    "encoder_hidden_states_t5", "encoder_hidden_states_image", "encoder_hidden_states_mask", "attention_mask",
    "encoder_attention_mask", "encoder_attention_mask_1", "encoder_attention_mask_2", "text_embedding_mask",
    "text_embedding_mask_t5", "pooled_projections", "image_embeds", "text_embeds", "time_ids", "added_time_ids",
    "class_labels", "guidance", "timestep", "timestep_cond", "resolution", "aspect_ratio", "original_size",
    "target_size", "crop_coords", "image_meta_size", "style", "global_hidden_states", "image_latents",
    "image_embeddings", "hint", "ofs", "video_coords", "ip_adapter_image_embeds", "ip_hidden_states", "boxes",
    "positive_embeddings", "masks", "controlnet_block_samples", "controlnet_single_block_samples",
    "block_controlnet_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual",
    "down_intrablock_additional_residuals", "temb", "emb", "res_hidden_states_tuple",
})  # fmt: skip
LISTS_BY_ROW = frozenset({"img_shapes", "txt_seq_lens"})  # lists of numbers with an entry for each image
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))

Rows = Callable[[Any], Any]  # makes other rows of a tensor or a list


class Batches:
    """What is known of the arguments of the forward of a denoiser, or of a module in it.

    A UNet for video may be given several rows an image (its frames), so for a UNet any multiple of the batch is one.
    """

    def __init__(self, anatomy: Anatomy, module: nn.Module | None = None) -> None:
        self.family, own = anatomy.family, anatomy.denoiser if module is None else module
        self.names, self.named = parameters(own), named(own)

    def size(self, args: tuple, kwargs: dict) -> int:
        """Rows of the latents, which are the first argument; 0 where they are no single tensor."""
        first = self.named(args, kwargs).get(self.names[0])
        return len(first) if isinstance(first, Tensor) and first.ndim > 1 else 0

    def unknown(self, args: tuple, kwargs: dict) -> str | None:
        """The first argument of which nobody knows how it holds the batch; None where `change` is right."""
        batch = self.size(args, kwargs)
        if not self.family.batches or not batch:
            return self.names[0]
        given = self.named(args, kwargs).items()
        return next((name for name, value in given if not self._known(name, value, batch)), None)

    def change(self, args: tuple, kwargs: dict, rows: Rows) -> tuple[tuple, dict[str, Any]]:
        """The arguments with `rows` made of everything that has a row for each image; for those that are all known.

        A timestep that is one number for all is left as it is.
        """
        batch = self.size(args, kwargs)
        out = {name: self._changed(name, value, batch, rows) for name, value in self.named(args, kwargs).items()}
        return tuple(out[name] for name in self.names[: len(args)]), {name: out[name] for name in kwargs}

    def replaced(self, args: tuple, kwargs: dict, name: str, value: Any) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another value of one of them."""
        if name in kwargs:
            return args, {**kwargs, name: value}
        place = self.names.index(name)
        return (*args[:place], value, *args[place + 1 :]), kwargs

    def _by_row(self, name: str) -> bool:
        return name in BY_ROW or name == self.names[0]

    def _fits(self, leaf: Tensor, batch: int) -> bool:
        return leaf.ndim > 0 and (len(leaf) == batch or (self.family.kind == "unet" and not len(leaf) % batch))

    def _known(self, name: str, value: Any, batch: int) -> bool:
        if isinstance(value, Tensor):
            if value.ndim == 0 or (name == "timestep" and value.numel() == 1) or is_table(name):
                return True
            return self._by_row(name) and self._fits(value, batch)
        if isinstance(value, dict):
            return all(self._known(key, part, batch) for key, part in value.items())
        if type(value) in (list, tuple):
            if name in LISTS_BY_ROW:
                return len(value) == batch and is_plain(value)
            return all(self._known(name, part, batch) for part in value)
        return is_plain(value)

    def _changed(self, name: str, value: Any, batch: int, rows: Rows) -> Any:
        if isinstance(value, Tensor):
            return rows(value) if self._by_row(name) and not is_table(name) and self._fits(value, batch) else value
        if isinstance(value, dict):
            return {key: self._changed(key, part, batch, rows) for key, part in value.items()}
        if type(value) in (list, tuple):
            if name in LISTS_BY_ROW:
                return rows(value)
            return type(value)(self._changed(name, part, batch, rows) for part in value)
        return value


def is_table(name: str) -> bool:
    """Whether an argument holds places, which are the same for every row."""
    return any(part in name for part in NO_BATCH)


def is_plain(value: Any) -> bool:
    """Whether a value holds nothing but numbers and names, which are the same for every row."""
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))
