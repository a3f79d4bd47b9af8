"""Tiny pipelines in the layouts in which other programs keep them: the names that diffusers' own readers look for."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def stable_diffusion(pipe: Any) -> dict[str, Tensor]:
    """One checkpoint as CompVis, A1111 and ComfyUI keep it, of a Stable Diffusion 1 with two layers a level."""
    found = {f"model.diffusion_model.{_unet(name)}": value for name, value in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        square = ".attn_1." in (told := _vae(name)) and told.endswith("weight") and "norm" not in told
        found[f"first_stage_model.{told}"] = value[:, :, None, None] if square else value
    text = pipe.text_encoder.state_dict()
    prefix = "" if any(name.startswith("text_model.") for name in text) else "text_model."
    found |= {f"cond_stage_model.transformer.{prefix}{name}": value for name, value in text.items()}
    return {name: value.clone().contiguous() for name, value in found.items()}


def _unet(name: str) -> str:
    head, _, tail = name.rpartition(".")
    if head in _ENDS:
        return f"{_ENDS[head]}.{tail}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, rest = found[1], int(found[2]), found[3]
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{_inside(kind, rest)}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert found is not None, name
    side, level, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    block = f"input_blocks.{3 * level + number + 1}" if side == "down" else f"output_blocks.{3 * level + number}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    head, _, tail = rest.partition(".")
    return f"{_RESNET[head]}.{tail}" if kind == "resnets" else rest


def _vae(name: str) -> str:
    levels = 4
    for ours, theirs in (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")):
        name = name.replace(ours, theirs)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return name


_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1.": "self_attn.", "attn2.": "cross_attn.", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head",
}  # fmt: skip


def wan(transformer: Any, prefix: str = "") -> dict[str, Tensor]:
    """A Wan transformer as its makers keep it; with `prefix` model.diffusion_model. as ComfyUI does."""
    found = {}
    for name, value in transformer.state_dict().items():
        told = re.sub(r"norm2", "norm3", name) if ".norm2" in name else name
        told = told.replace("scale_shift_table", "modulation" if "blocks" in told else "head.modulation")
        for ours, theirs in _WAN.items():
            told = told.replace(ours, theirs)
        found[prefix + told] = value.clone().contiguous()
    return found
