"""Leaving out the unconditional half of classifier-free guidance, as one batch or as a call of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import parameters
from fastdiff.clock import Run

from .batches import Batches
from .predictors import combine
from .protocols import Live


class GuidanceGate:
    """The denoiser's forward, which after the gate is only asked for the conditional output.

    Whether a batch holds both halves is told by the solver, which is given half as many. Without `delta` the
    unconditional output is the conditional one, so that guidance does nothing; with it, their last known difference
    is added. Cross-attention that was frozen for both halves is averaged, as in the paper.
    """

    def __init__(
        self, gated: Callable[[Run, int], bool], order: int, session: Live, forward: Callable[..., Any], delta: bool
    ) -> None:
        """gated: whether guidance is left out at a step of a run; order: differences a prediction may use."""
        self.gated, self.order, self.session, self.forward, self.delta = gated, order, session, forward, delta
        self._batches = Batches(session.anatomy, parameters(session.anatomy.denoiser))
        self._solved = 0
        self._halved = False
        self._cond: dict[int, list[Any]] = {}  # by step: what the conditional call gave
        self._steps: list[int] = []
        self._deltas: list[list[Any]] = []
        for region in session.regions:
            if region.kind == "cross":
                session.patches.wrap_forward(region.units[0], self._averaged)
        clock = session.clock
        clock.on_output.append(lambda _, output: setattr(self, "_solved", len(output)))
        clock.on_start.append(self._reset)
        clock.on_end.append(self._reset)

    def _reset(self, run: Run) -> None:
        self._solved, self._cond, self._steps, self._deltas = 0, {}, [], []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.session.clock.now
        assert step is not None
        batch = self._batches.size(args, kwargs)
        perturbed = getattr(self.session.clock.pipe, "do_perturbed_attention_guidance", False) is True
        both = self._solved > 0 and batch == 2 * self._solved and not perturbed  # PAG has other halves
        gated = self.gated(step.run, step.index)
        halves = None
        if gated and (perturbed or 0 < 2 * self._solved < batch):
            self.session.recorder.note("guidance goes on: the batch does not hold two halves, or those of PAG")
        if gated and both:  # rows of the second, conditional half of everything that holds two
            halves = self._batches.change(args, kwargs, batch, lambda leaf: leaf[len(leaf) // 2 :])
            if halves is None:
                self.session.recorder.note("guidance goes on: not all inputs of this denoiser have the batch first")
        elif gated and self._solved > 0 and batch == 0:  # a list of images
            self.session.recorder.note("guidance goes on: not all inputs of this denoiser have the batch first")
        if halves is not None:
            return self._half(step.index, *halves)
        if gated and step.branch == 1 and step.index in self._cond and batch == self._solved:
            self.session.recorder.skipped()
            return self._rebuilt(step.index, self._cond[step.index])
        output = self.forward(*args, **kwargs)
        self._learn(step.index, step.branch, both or step.index == 0, output)
        return output

    def _learn(self, index: int, branch: int, both: bool, output: Any) -> None:
        leaves, self._form = pytree.tree_flatten(output)
        if branch == 0:
            self._cond = {index: leaves}
        if not self.delta:
            return
        if branch == 1 and index in self._cond:
            self._keep(index, [_minus(a, b) for a, b in zip(leaves, self._cond[index], strict=True)])
        elif branch == 0 and both and isinstance(leaves[0], Tensor) and len(leaves[0]) % 2 == 0:
            halves = [leaf.chunk(2) if isinstance(leaf, Tensor) else (leaf, leaf) for leaf in leaves]
            self._keep(index, [_minus(*pair) for pair in halves])

    def _keep(self, index: int, delta: list[Any]) -> None:
        if self._steps and self._steps[-1] == index:
            self._steps.pop(), self._deltas.pop()
        self._steps.append(index)
        self._deltas.append(delta)
        del self._steps[: -self.order], self._deltas[: -self.order]

    def _half(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Both outputs from one forward of the conditional half."""
        self._halved = True
        try:
            leaves, form = pytree.tree_flatten(self.forward(*args, **kwargs))
        finally:
            self._halved = False
        self.session.recorder.skipped()
        uncond = self._with_delta(index, leaves)
        joined = [torch.cat([u, c]) if isinstance(c, Tensor) else c for u, c in zip(uncond, leaves, strict=True)]
        return pytree.tree_unflatten(joined, form)

    def _rebuilt(self, index: int, cond: list[Any]) -> Any:
        return pytree.tree_unflatten(self._with_delta(index, cond), self._form)

    def _with_delta(self, index: int, leaves: list[Any]) -> list[Any]:
        if not self.delta or not self._deltas:
            return leaves
        factors = self.session.weigh(index, self._steps)
        columns = zip(leaves, zip(*self._deltas, strict=True), strict=True)
        return [leaf + combine(factors, known) if isinstance(leaf, Tensor) else leaf for leaf, known in columns]

    def _averaged(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A cross-attention layer whose remembered output is of both halves, in a call of one."""

        @wraps(inner)
        def averaged(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if not self._halved:
                return output
            return pytree.tree_map(lambda leaf: sum(leaf.chunk(2)) / 2 if isinstance(leaf, Tensor) else leaf, output)

        return averaged


def _minus(a: Any, b: Any) -> Any:
    return a - b if isinstance(a, Tensor) else a
