"""Calls of the denoiser as they come in real runs, kept to be made again on a changed model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.affine import wide
from fastdiff.anatomy import Anatomy
from fastdiff.clock import Step
from fastdiff.errors import BadModel
from fastdiff.patch import PatchSet

from .guided import Guidance, Mark

Call = tuple[tuple, dict[str, Any]]


class Calls:
    """At `moments` steps spread over each run, what the denoiser was given in every branch, and what it gave.

    The arguments stay where they were; a call is one batch of latents, some kilobytes to megabytes.
    """

    def __init__(self, anatomy: Anatomy, moments: int = 4) -> None:
        self.anatomy, self.moments = anatomy, moments
        self.given: list[Call] = []
        self.truth: list[Tensor] = []
        self.when: list[Mark] = []
        self.guidance = Guidance()

    def listen(self, now: Callable[[], Step | None], patches: PatchSet) -> None:
        """Keep calls from now on; `now` tells the step, `patches` takes the ear off again."""

        def listening(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def heard(*args: Any, **kwargs: Any) -> Any:
                step = now()
                if step is None or step.index not in self._chosen(step.run.total):
                    return forward(*args, **kwargs)
                self.given.append(copied((args, kwargs)))  # before the model may write into them
                output = forward(*args, **kwargs)
                self.truth.append(first(output).detach().clone())
                self.when.append((step.run.number, step.index))
                return output

            return heard

        patches.wrap_forward(self.anatomy.denoiser, listening)

    def _chosen(self, total: int) -> set[int]:
        return {min(total - 1, int((k + 0.5) * total / self.moments)) for k in range(self.moments)}

    def only(self, numbers: Iterable[int]) -> Calls:
        """Some of the calls."""
        part = Calls(self.anatomy, self.moments)
        for k in numbers:
            part.given.append(self.given[k])
            part.truth.append(self.truth[k])
            part.when.append(self.when[k])
        part.guidance = self.guidance
        return part

    def halves(self) -> tuple[Calls, Calls]:
        """Calls to fit on, and calls to judge by: those of every other run or, of a single run, every other step."""
        runs, steps = (sorted({mark[which] for mark in self.when}) for which in (0, 1))
        which, marks = (0, runs) if len(runs) > 1 else (1, steps)
        if len(marks) < 2:
            raise BadModel("calibration heard fewer than 2 steps of the denoiser; give more steps or prompts")
        odd = [marks.index(mark[which]) % 2 for mark in self.when]
        return self.only(k for k, o in enumerate(odd) if not o), self.only(k for k, o in enumerate(odd) if o)

    @torch.no_grad()
    def outputs(self) -> Iterator[Tensor]:
        """What the denoiser gives now, call by call."""
        for args, kwargs in self.given:
            args, kwargs = copied((args, kwargs))
            yield first(self.anatomy.denoiser(*args, **kwargs))

    def solved(self, index: int, given: Any) -> None:
        """What the solver is given at a step."""
        if self.when and self.when[-1][1] == index:
            mark = self.when[-1]
            outputs = [truth for truth, own in zip(self.truth, self.when, strict=True) if own == mark]
            self.guidance.solved(mark, outputs, given)

    def error(self, guided: bool = False) -> float:
        """Mean over the calls of |output - truth|^2 / |truth|^2; not finite where an output is not.

        guided: of what guidance makes of the outputs of a step, where that is known and all of its calls are here.
        """
        plain = zip(self.outputs(), self.truth, strict=True)
        pairs = self.guidance.pairs(self.when, [*self.outputs()], self.truth) if guided else plain
        found = [relative(now, truth) for now, truth in pairs]
        if not found:
            raise BadModel("calibration heard no call of the denoiser")
        return sum(found) / len(found)


def relative(value: Tensor, truth: Tensor) -> float:
    """Squared error over the squared norm of the truth."""
    value, truth = wide(value), wide(truth)
    return float((value - truth).square().sum() / truth.square().sum().clamp_min(1e-300))


@contextmanager
def swapped(root: nn.Module, instead: dict[str, nn.Module]) -> Iterator[None]:
    """Other modules in the places named, for a while; the very same modules come back."""
    patches = PatchSet()
    try:
        for path, module in instead.items():
            parent, _, name = path.rpartition(".")
            patches.replace(root.get_submodule(parent), name, module)
        yield
    finally:
        patches.restore()


def copied(tree: Any) -> Any:
    """Arguments whose tensors nobody else may write into."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def first(output: Any) -> Tensor:
    """What a denoiser gives, out of what it is wrapped in."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
