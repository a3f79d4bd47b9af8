"""A second pipeline object over the same weights, for code that changes what it accelerates as it likes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

from torch import Tensor, nn

from fastdiff.pipelines.families import denoisers


class Twin:
    """`pipe` draws what the original draws; whatever is done to it or its denoiser, the original does not see.

    All components are the original's own objects but the denoiser, which is a copy of the module tree around the very
    same tensors. The pipeline's class is a throw-away subclass of the same name, because cache-dit patches classes.
    """

    def __init__(self, original: Any) -> None:
        self.component, module = next(iter(denoisers(original).items()))
        self.denoiser: Any = share(module)
        kind = type(original)
        self.pipe = copy.copy(original)
        self.pipe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
        vars(self.pipe)[self.component] = self.denoiser
        self.blocks = blocks_of(self.denoiser)

    def around_denoiser(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `wrapper(forward)` outermost."""
        inner = self.denoiser.forward
        self.denoiser.forward = wraps(inner)(wrapper(inner))


def share(module: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the same parameters and buffers, not copies of them."""
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, tensors)


def blocks_of(denoiser: Any) -> list[nn.Module]:
    """The blocks that a cache leaves out: down, mid and up blocks of a UNet, else all entries of the module lists."""
    if hasattr(denoiser, "down_blocks"):
        return [
            block for block in (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks) if block is not None
        ]
    stacks = (child for child in denoiser.children() if isinstance(child, nn.ModuleList))
    return [block for stack in stacks for block in stack]


class Clock:
    """Where a run of the pipeline is, as seen from the calls of its denoiser."""

    def __init__(self, twin: Twin) -> None:
        self.scheduler = twin.pipe.scheduler
        self._grid: Tensor | None = None
        self._values: list[float] = []
        self._parameters = list(inspect.signature(type(twin.denoiser).forward).parameters)[1:]
        self.reset()

    def reset(self) -> None:
        self.step, self.branch, self.timestep = -1, 0, float("nan")

    def _value(self, timestep: Tensor) -> float:
        """A number, without waiting for a GPU if the tensor is a view of the scheduler's own list."""
        grid = self.scheduler.timesteps
        if self._grid is not grid:
            self._grid, self._values = grid, grid.tolist()
        index, rest = divmod(timestep.data_ptr() - grid.data_ptr(), grid.element_size())
        if rest == 0 and 0 <= index < len(self._values) and timestep.dtype == grid.dtype:
            return float(self._values[index])
        return float(timestep.reshape(-1)[0])

    def now(self) -> Any:
        """The timestep; caches of diffusers say that they want an integer, but only compare it."""
        return self.timestep

    @property
    def total(self) -> int:
        return len(self.scheduler.timesteps)

    def see(self, args: tuple, kwargs: dict) -> None:
        """A call of the denoiser begins; the second one at a timestep is another branch of guidance, not a new step."""
        timestep = self._value((dict(zip(self._parameters, args, strict=False)) | kwargs)["timestep"])
        if timestep == self.timestep:
            self.branch += 1
        else:
            self.step, self.branch, self.timestep = self.step + 1, 0, timestep


@dataclass
class Counter:
    """Counts the steps in which every block of the denoiser ran."""

    twin: Twin

    def __post_init__(self) -> None:
        self._fired = [0] * len(self.twin.blocks)
        self._calls = 0
        for index, block in enumerate(self.twin.blocks):
            _leaf(block).register_forward_hook(self._count(index))
        self.twin.denoiser.register_forward_hook(self._called)

    def reset(self) -> None:
        self._fired, self._calls = [0] * len(self._fired), 0

    @property
    def computed(self) -> int:
        steps = len(self.twin.pipe.scheduler.timesteps)
        return round(min(self._fired) * steps / self._calls)  # guidance may take two calls a step

    def _count(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._fired[index] += 1

        return hook

    def _called(self, *_: Any) -> None:
        self._calls += 1


def _leaf(block: Any) -> nn.Module:
    """A layer that runs whenever the block is computed, even by who predicts its attention."""
    if hasattr(block, "resnets"):
        return block.resnets[0].conv1
    return [module for module in block.modules() if isinstance(module, nn.Linear)][-1]
