"""Parts of a denoiser that add something to a stream, and may be left out for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastdiff.anatomy import Anatomy

_FEED_FORWARD = ("ff", "ff_context", "ffn", "mlp", "feed_forward", "ff_i", "ff_t", "txt_mlp", "img_mlp")
_ATTENTION = ("to_q", "to_qkv", "to_query")


@dataclass(frozen=True)
class Component:
    """Modules that go together. depth: the place of its block among all, 0 for the first, near 1 for the last.

    residual: whether the module's output holds its input, as that of a ResNet block does.
    """

    paths: tuple[str, ...]
    kind: Literal["attention", "feed_forward", "resnet", "block"]
    depth: float
    residual: bool = False

    @property
    def name(self) -> str:
        return " + ".join(self.paths)


def components(anatomy: Anatomy) -> list[Component]:
    """In call order: ResNet blocks and transformers of a UNet, attention and feed-forward layers, and whole blocks."""
    if anatomy.opaque:
        raise anatomy.without("blocks, whose parts could be left out", "leave out quant.prune")
    blocks = list(roots(anatomy))
    out: list[Component] = []
    for number, (path, root) in enumerate(blocks):
        depth = number / len(blocks)
        if anatomy.family.kind == "unet":
            if _same_width(root):
                out.append(Component((path,), "resnet", depth, residual=True))
                continue
            if getattr(root, "transformer_blocks", None) is not None:
                out.append(Component((path,), "block", depth, residual=True))
        inside = list(_parts(root, path, depth))
        out += inside
        if anatomy.family.kind == "transformer" and len(inside) > 1:
            out.append(Component(tuple(p for part in inside for p in part.paths), "block", depth))
    return out


def roots(anatomy: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each block in call order: of a transformer's stacks, or ResNet blocks and transformers of a
    UNet."""
    if anatomy.family.kind == "transformer":
        for stack in anatomy.family.stacks:
            for name, block in anatomy.denoiser.get_submodule(stack.path).named_children():
                yield f"{stack.path}.{name}", block
        return
    unet: Any = anatomy.denoiser
    named = [("down_blocks", unet.down_blocks), ("mid_block", [unet.mid_block]), ("up_blocks", unet.up_blocks)]
    for prefix, blocks in named:
        for number, block in enumerate(blocks):
            path = prefix if prefix == "mid_block" else f"{prefix}.{number}"
            for kind in ("resnets", "attentions"):
                for k, unit in enumerate(getattr(block, kind, None) or ()):
                    if unit is not None:
                        yield f"{path}.{kind}.{k}", unit


def early(anatomy: Anatomy, share: float) -> tuple[str, ...]:
    """Paths of the first blocks, this share of each stack rounded; a UNet is one stack."""
    stacks: dict[str, list[str]] = {}
    for path, _ in roots(anatomy):
        stacks.setdefault("" if anatomy.family.kind == "unet" else path.rpartition(".")[0], []).append(path)
    return tuple(path for paths in stacks.values() for path in paths[: round(share * len(paths))])


def _parts(root: nn.Module, prefix: str, depth: float) -> Iterator[Component]:
    outer: list[str] = []
    for path, module in root.named_modules():
        if any(path.startswith(f"{done}.") for done in outer) or not path:
            continue
        attends = any(hasattr(module, name) for name in _ATTENTION)
        if attends or path.rpartition(".")[2] in _FEED_FORWARD:
            outer.append(path)
            residual = bool(getattr(module, "residual_connection", False))
            yield Component((f"{prefix}.{path}",), "attention" if attends else "feed_forward", depth, residual)


def _same_width(unit: Any) -> bool:
    """A ResNet block that adds to what it is given, without a change of channels or size."""
    plain = getattr(unit, "upsample", None) is None and getattr(unit, "downsample", None) is None
    return plain and hasattr(unit, "conv2") and getattr(unit, "conv_shortcut", None) is None
