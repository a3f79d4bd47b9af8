"""FlexRound on blocks, as in the paper (https://arxiv.org/abs/2306.00317): what a block gives counts, not a layer.

The divisors of all layers of a block are learned together, on the error of its output. What is unlike the paper: they
start from what was learned layer by layer, and the block is given what the quantized blocks before it make, in both
the float and the rounded form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastdiff.errors import BadConfig

from .build import Found
from .calls import Calls, copied
from .divisors import Divided
from .flexround import FlexRound, takes
from .packing import Tensors
from .recipe import Recipe
from .sensitivity import weights

Record = tuple[tuple, dict[str, Any], list[Tensor]]  # what a block was given, and what it gave


@dataclass(frozen=True)
class Reconstruction:
    """Learns the rounding of a denoiser's layers block by block, and of those outside of blocks layer by layer.

    chosen: all layers that are quantized, in their order. blocks: path and module of each. most: bytes of what a block
    is given and gives in the calls that are kept; of a block that takes less, all calls are. What was learned is kept
    only where it lowers the error of the block's output on calls that it was not learned on.
    """

    layerwise: FlexRound
    chosen: list[tuple[Found, Recipe]]
    blocks: Mapping[str, nn.Module]
    steps: int = 300
    rate: float = 1e-3
    most: int = 1 << 30
    _made: dict[str, Tensors] = field(default_factory=dict)  # of blocks that were learned, by layer
    _done: set[str] = field(default_factory=set)

    def __call__(self, found: Found, recipe: Recipe) -> Callable[[Tensor, Recipe], Tensors] | None:
        """What makes the stored tensors of the layer's weight, or None, as FlexRound says.

        Raises BadConfig for a block of which not even two calls are within the bytes.
        """
        path = next((path for path in self.blocks if found.name.startswith(f"{path}.")), None)
        if path is None:
            return self.layerwise(found, recipe)
        if path not in self._done:
            self._done.add(path)
            self._made.update({name: one.tensors() for name, one in self._learned(path).items()})
        tensors = self._made.pop(found.name, None)
        return None if tensors is None else lambda weight, own: tensors

    def _learned(self, path: str) -> dict[str, Divided]:
        block = self.blocks[path]
        inside = dict(block.named_modules())
        layers = [
            (found, recipe)
            for found, recipe in self.chosen
            if takes(found, recipe) and inside.get(found.name.removeprefix(f"{path}.")) is found.layer
        ]
        fitted, judged = (list(self.records(path, half)) for half in self.layerwise.calls.halves())
        started = self._started(layers)
        if started and fitted and judged:
            inner = {name.removeprefix(f"{path}."): one for name, one in started.items()}
            together(block, inner, fitted, judged, self.steps, self.rate)
        return started

    def _started(self, layers: list[tuple[Found, Recipe]]) -> dict[str, Divided]:
        """Learned one after the other, each behind those before it as they are stored."""
        made: dict[str, Divided] = {}
        so_far: dict[nn.Module, Tensor] = {}
        for found, recipe in layers:
            with weights(so_far):
                moments = self.layerwise.moments(found, recipe)
            if moments is not None:
                weight = found.layer.weight.detach()
                made[found.name] = self.layerwise.learned(weight.float().flatten(1), recipe, moments)
                so_far[found.layer] = made[found.name].kept().view(weight.shape).to(weight.dtype)
        return made

    def records(self, path: str, calls: Calls) -> Iterator[Record]:
        """Calls of the block, evenly spread over those of the denoiser, as many as there is room for in half of the
        bytes."""
        first = list(heard(self.blocks[path], calls.only([0])))
        if not first:
            return
        each, count = sum(map(_bytes, first)), len(calls.given)
        room = min(count, self.most // 2 // max(1, each))
        if not room:
            raise BadConfig(
                f"a call of {path} takes {each / 1e6:.0f} MB, and two must be within {self.most / 1e6:.0f} MB for "
                "quant.reconstruct = block: calibrate with fewer prompts in a batch, or take reconstruct = layer"
            )
        yield from first
        for number in range(1, room):
            yield from heard(self.blocks[path], calls.only([number * count // room]))


def together(
    block: nn.Module, layers: Mapping[str, Divided], fitted: list[Record], judged: list[Record], steps: int, rate: float
) -> None:  # fmt: skip
    """Learns the divisors of a block's layers, by their paths in it, at once: a step for one call of `fitted` after the
    other, by the error of what the block gives. All that is better on `judged` is kept.
    """
    own: dict[str, Any] = {name: block.get_submodule(name).weight for name in layers}

    def error(record: Record, values: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = copied(record[:2])
        put = {f"{name}.weight": value.view(own[name].shape).to(own[name].dtype) for name, value in values.items()}
        return _off(_tensors(functional_call(block, put, args, kwargs)), record[2])

    @torch.no_grad()
    def judgement(values: Mapping[str, Tensor]) -> float:
        return sum(float(error(record, values)) for record in judged) / len(judged)

    least = judgement({name: one.kept() for name, one in layers.items()})
    groups: list[dict[str, Any]] = []
    for one in layers.values():
        one.back()
        groups.append({"params": one.parameters, "lr": one.rate(rate)})
    optimizer = torch.optim.Adam(groups)
    learned = [parameter for one in layers.values() for parameter in one.parameters]
    for step in range(steps):
        with torch.enable_grad():
            found = error(fitted[step % len(fitted)], {name: one.soft() for name, one in layers.items()})
            slopes = torch.autograd.grad(found, learned, allow_unused=True)  # leaves no gradient on the model
        for parameter, slope in zip(learned, slopes, strict=True):
            parameter.grad = slope
        optimizer.step()
        if step % 20 == 19 or step == steps - 1:
            now = judgement({name: one.now() for name, one in layers.items()})
            if now < least:
                least = now
                for one in layers.values():
                    one.keep()


def heard(block: nn.Module, calls: Calls) -> Iterator[Record]:
    """What a block is given and gives in calls of the denoiser."""
    given: list[tuple[tuple, dict[str, Any]]] = []
    found: list[Record] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.append(copied((args, kwargs)))  # before the block may write into them

    def after(_: nn.Module, args: tuple, output: Any) -> None:
        found.append((*given.pop(), [tensor.detach().clone() for tensor in _tensors(output)]))

    with (
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ):
        for _ in calls.outputs():
            pass
    yield from found


def _off(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Squared error over the squared norm of what is wanted, a sum over what a block gives."""
    parts = [
        (now.float() - then.float()).square().sum() / then.float().square().sum().clamp_min(1e-12)
        for now, then in zip(found, wanted, strict=True)
    ]
    return torch.stack(parts).sum()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(record: Record) -> int:
    return sum(tensor.nbytes for tensor in _tensors(record))
