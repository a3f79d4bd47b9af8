"""The places in a denoiser where a cached step may stop computing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.anatomy import Anatomy, Stack, parameters
from fastdiff.errors import BadConfig, UnsupportedModel

from .region import Probe, Region
from .unet import unet_inner, unet_parts

Site: TypeAlias = Literal["auto", "output", "stack", "inner"]
_LATENTS = ("hidden_states", "sample", "latents", "x")  # what a denoiser calls its noisy latents
_FEED_FORWARD = ("ff", "ff_context", "ffn", "mlp", "feed_forward", "ff_i", "ff_t", "txt_mlp", "img_mlp")


def model_output(anatomy: Anatomy, probe: Probe | None = None) -> Region:
    """The whole denoiser: a cached step runs none of it."""
    return Region("model output", (anatomy.denoiser,), probe=probe, hides_control=True)


def latent_probe(anatomy: Anatomy) -> Probe:
    """The latents that enter the denoiser. Raises UnsupportedModel where nothing tells which argument they are: what
    stays the same at every step would be taken for latents that do not move, and every step left out."""
    first = next(iter(parameters(anatomy.denoiser)), "")
    name = anatomy.family.latents or (first if anatomy.recognised or first in _LATENTS else "")
    if not name:
        raise UnsupportedModel(
            f"which argument of {type(anatomy.denoiser).__name__} holds the latents is not described "
            "(Family.latents = its name describes it); take a method that does not look at them, such as ab_cache"
        )
    return Probe(_reading(name), anatomy.denoiser)


def _reading(name: str) -> Any:
    """Reads an argument of a module, as one tensor where it is a list of them (Z-Image)."""

    def read(inputs: dict[str, Any], _output: Any) -> Tensor:
        leaves = [leaf.detach() for leaf in pytree.tree_leaves(inputs[name]) if isinstance(leaf, Tensor)]
        return leaves[0].clone() if len(leaves) == 1 else torch.stack(leaves)

    return read


def at(site: Site, anatomy: Anatomy, *, live: int = 1, branch: int = 0, probe: Probe | None = None) -> Region:
    """The region a setting names; "auto" is the block stack of a transformer, the inside of a UNet, and all of a
    denoiser whose inside nobody described."""
    if site == "auto":
        site = "output" if anatomy.opaque else "stack" if anatomy.family.kind == "transformer" else "inner"
    if site == "output":
        return model_output(anatomy, probe)
    if site == "stack":
        return block_stack(anatomy, live, probe=probe)
    return replace(unet_inner(anatomy, branch), probe=probe)


def stack_blocks(anatomy: Anatomy) -> list[nn.Module]:
    """Transformer blocks in call order. Raises UnsupportedModel where there are none."""
    blocks = anatomy.blocks
    if anatomy.family.kind != "transformer" or not blocks:
        raise anatomy.without("stack of transformer blocks")
    return blocks


def block_stack(anatomy: Anatomy, live: int, tail: int = 0, probe: Probe | None = None) -> Region:
    """Every transformer block between the first `live` and the last `tail`; what is kept is their residual.

    The probe is the residual of the live blocks, unless another is given.
    """
    blocks = stack_blocks(anatomy)
    if live + tail >= len(blocks):
        raise BadConfig(f"{live + tail} live blocks of {len(blocks)}: at least 1 must be left to cache")
    if tail and anatomy.family.long_skips:
        raise UnsupportedModel(
            f"the last blocks of {anatomy.family.name} read what the cached ones give; set none live"
        )
    inner = blocks[live : len(blocks) - tail]
    entry, exit_ = anatomy.stack_of(inner[0]), anatomy.stack_of(inner[-1])
    if set(entry.takes) < set(exit_.returns):
        raise UnsupportedModel(f"{anatomy.family.name}: the last block returns more streams than block {live} takes")
    takes = tuple(stream for stream in entry.takes if stream in exit_.returns)
    if probe is None and live:
        probe = Probe(_residual(anatomy, blocks[live - 1]), blocks[live - 1])
    return Region("block stack", tuple(inner), "residual", takes, exit_.returns, probe)


def _residual(anatomy: Anatomy, block: nn.Module) -> Any:
    first, head = anatomy.stack_of(anatomy.blocks[0]).takes[0], anatomy.stack_of(block)

    def residual(inputs: dict[str, Any], output: Any) -> Tensor:
        leaving = output[head.returns.index(first)] if isinstance(output, tuple) else output
        return leaving - inputs[first]

    return residual


def each_block(anatomy: Anatomy) -> list[Region]:
    """Every transformer block by itself, for what it adds to the streams; every block of a UNet, for its output."""
    if anatomy.family.kind == "unet":
        return unet_parts(anatomy, "block")
    regions = []
    for number, block in enumerate(stack_blocks(anatomy)):
        stack = anatomy.stack_of(block)
        takes = tuple(stream for stream in stack.takes if stream in stack.returns)
        regions.append(Region(f"block {number}", (block,), "residual", takes, stack.returns))
    return regions


def first_half(anatomy: Anatomy) -> list[Region]:
    """The first half of the transformer blocks, whose output is kept: of each block, where later ones read them all."""
    blocks = stack_blocks(anatomy)
    half = blocks[: max(1, len(blocks) // 2)]
    if anatomy.family.long_skips:
        return [Region(f"block {number}", (block,)) for number, block in enumerate(half)]
    return [Region("first half", tuple(half))]


def attention_input(anatomy: Anatomy) -> Probe:
    """What enters the first attention layer: the latents, normalised and modulated by the timestep."""
    found = [module for _, module in attention_layers(stack_blocks(anatomy)[0])]
    if not found:
        raise UnsupportedModel(
            f"the first block of {anatomy.family.name} has no attention layer that fastdiff recognises"
        )
    return Probe(_reading(parameters(found[0])[0]), found[0])


def attention_layers(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Attention layers by path, in the order of the modules; they hold their projections or a processor."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in root.named_modules():
        own = path.rpartition(".")[2]
        attends = any(hasattr(module, name) for name in ("to_q", "to_qkv", "to_query")) or (
            hasattr(module, "processor") and ("attn" in own or "attention" in own)
        )
        if attends and path and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    return found


def sublayers(anatomy: Anatomy) -> list[Region]:
    """Each attention and feed-forward layer of the blocks by itself; kind is self, cross, temporal or ff."""
    if anatomy.opaque:
        raise anatomy.without("blocks, and the attention layers in them")
    out: list[Region] = []
    for root, prefix in _roots(anatomy):
        for path, module in attention_layers(root):
            out.append(Region(f"{prefix}.{path}", (module,), kind=attention_kind(f"{prefix}.{path}")))
        for path, module in root.named_modules():
            if path.rpartition(".")[2] in _FEED_FORWARD and "motion_modules" not in path:
                out.append(Region(f"{prefix}.{path}", (module,), kind="ff"))
    if not any(region.kind != "ff" for region in out):
        raise UnsupportedModel(f"{anatomy.family.name} has no attention layers that fastdiff recognises")
    return out


def attention_kind(path: str) -> str:
    """What an attention layer attends to, told by its place: cross, temporal or self (joint counts as self)."""
    name = path.rpartition(".")[2]
    if "temporal" in path or "motion_modules" in path or "temp" in name:
        return "temporal"
    return "cross" if name == "attn2" or "cross" in name else "self"


def _roots(anatomy: Anatomy) -> list[tuple[nn.Module, str]]:
    if anatomy.family.kind == "transformer":
        stacks: tuple[Stack, ...] = anatomy.family.stacks
        lists = [(stack.path, anatomy.denoiser.get_submodule(stack.path)) for stack in stacks]
        return [(block, f"{path}.{k}") for path, blocks in lists for k, block in enumerate(blocks.children())]
    unet: Any = anatomy.denoiser
    named = [("down_blocks", unet.down_blocks), ("mid_block", unet.mid_block), ("up_blocks", unet.up_blocks)]
    return [(part, name) for name, part in named if part is not None]
