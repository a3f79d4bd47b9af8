"""Leaving out the unconditional half of classifier-free guidance, as one batch or as a call of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.batches import Batches
from fastdiff.clock import Run, Step

from .predictors import combine
from .protocols import Live
from .roles import conditional


class GuidanceGate:
    """The denoiser's forward, which after the gate is only asked for the conditional output.

    Which output is the conditional one is told by the solver, which is given both with weights (`roles.conditional`);
    until that is known, guidance goes on. Without `delta` the unconditional output is the conditional one, so that
    guidance does nothing; with it, their last known difference is added. Cross-attention that was frozen for both
    halves is averaged, as in the paper.
    """

    def __init__(
        self, gated: Callable[[Run, int], bool], order: int, session: Live, forward: Callable[..., Any], delta: bool,
        news: Mapping[int, float] | None = None,
    ) -> None:  # fmt: skip
        """gated: whether guidance is left out at a step of a run; order: differences a prediction may use; news: how
        much of what the conditional output changed by since the last of them is added to it, by step."""
        self.gated, self.order, self.session, self.forward, self.delta = gated, order, session, forward, delta
        self.news = news or {}
        self._batches = Batches(session.anatomy)
        self._halved = False
        self._steps: list[int] = []
        self._deltas: list[list[Any]] = []
        for number, region in enumerate(session.regions):
            if region.kind == "cross":
                session.patches.wrap_forward(region.units[0], partial(self._averaged, number=number))
        clock = session.clock
        clock.on_output.append(self._told)
        clock.on_start.append(self._reset)
        clock.on_end.append(self._reset)
        self._reset()

    def _reset(self, _: Run | None = None) -> None:
        self._solved = 0  # rows of what the solver was given last
        self._roles: tuple[int, int] | None = None  # the conditional and the unconditional branch
        self._second: bool | None = None  # whether the second half of a batch is the conditional one
        self._at = -1  # a step, and what the calls in it gave: by branch the rows, and the leaves of the output
        self._outputs: dict[int, tuple[int, list[Any]]] = {}
        self._steps, self._deltas = [], []
        self._cond: list[Any] = []  # the conditional output at the last of these steps, where news are told by it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.session.clock.now
        assert step is not None
        batch = self._batches.size(args, kwargs)
        perturbed = getattr(self.session.clock.pipe, "do_perturbed_attention_guidance", False) is True
        both = self._solved > 0 and batch == 2 * self._solved and not perturbed  # PAG has other halves
        if step.index != self._at:
            self._at, self._outputs = step.index, {}
        served = self._served(step, batch, both, perturbed, args, kwargs) if self.gated(step.run, step.index) else None
        if served is not None:
            self.session.recorder.skipped()
            return served
        output = self.forward(*args, **kwargs)
        leaves, self._form = pytree.tree_flatten(output)
        self._outputs[step.branch] = 0 if perturbed else batch, leaves
        return output

    def _served(self, step: Step, batch: int, both: bool, perturbed: bool, args: tuple, kwargs: dict) -> Any | None:
        """What a call after the gate gives without the unconditional half; None where it has to be made as it is."""
        why = None
        if perturbed or 0 < 2 * self._solved < batch:
            why = "the batch does not hold two halves, or those of PAG"
        elif both and self._second is not True:
            why = "the solver does not show that the second half of the batch is the conditional one"
        elif both or (self._solved > 0 and batch == 0):  # 0: a list of images
            unknown = self._batches.unknown(args, kwargs)
            if unknown is None:  # rows of the second, conditional half of everything that holds two
                return self._half(step.index, *self._batches.change(args, kwargs, lambda own: own[len(own) // 2 :]))
            why = f"not all inputs of this denoiser are known to have the batch first: {unknown}"
        if why is not None:
            self.session.recorder.note(f"guidance goes on: {why}")
        cond = self._outputs.get(self._roles[0]) if self._roles and step.branch == self._roles[1] else None
        if cond is None or batch != self._solved:
            return None
        return pytree.tree_unflatten(self._with_delta(step.index, cond[1]), self._form)

    def _told(self, index: int, output: Any) -> None:
        """The solver is given an output: which of the denoiser's is in it, and how."""
        self._solved = len(output)
        calls = {branch: leaves for branch, (rows, leaves) in self._outputs.items() if rows == self._solved}
        whole = next((leaves for rows, leaves in self._outputs.values() if rows == 2 * self._solved), None)
        if index != self._at or not isinstance(output, Tensor):
            return
        if whole is not None:
            halves = [leaf.chunk(2) if isinstance(leaf, Tensor) else (leaf, leaf) for leaf in whole]
            if self._second is None and isinstance(whole[0], Tensor):
                self._second = conditional(halves[0][0], halves[0][1], output) == 1
            if self.delta and self._second:
                self._keep(index, [_minus(*pair) for pair in halves], [cond for _, cond in halves])
        elif len(calls) == 2:
            (one, first), (other, second) = calls.items()
            if self._roles is None and isinstance(first[0], Tensor):
                found = conditional(first[0], second[0], output)
                self._roles = None if found is None else ((one, other), (other, one))[found]
            if self.delta and self._roles:
                cond = calls[self._roles[0]]
                pairs = zip(calls[self._roles[1]], cond, strict=True)
                self._keep(index, [_minus(*pair) for pair in pairs], cond)

    def _keep(self, index: int, delta: list[Any], cond: list[Any]) -> None:
        if self._steps and self._steps[-1] == index:
            self._steps.pop(), self._deltas.pop()
        self._steps.append(index)
        self._deltas.append(delta)
        self._cond = cond if self.news else []
        del self._steps[: -self.order], self._deltas[: -self.order]

    def _half(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Both outputs from one forward of the conditional half."""
        self._halved = True
        self.session.overlook()
        try:
            leaves, form = pytree.tree_flatten(self.forward(*args, **kwargs))
        finally:
            self._halved = False
        uncond = self._with_delta(index, leaves)
        joined = [torch.cat([u, c]) if isinstance(c, Tensor) else c for u, c in zip(uncond, leaves, strict=True)]
        return pytree.tree_unflatten(joined, form)

    def _with_delta(self, index: int, leaves: list[Any]) -> list[Any]:
        if not self.delta or not self._deltas:
            return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        factors = self.session.weigh(index, self._steps)
        columns = zip(leaves, zip(*self._deltas, strict=True), strict=True)
        made = [leaf + combine(factors, known) if isinstance(leaf, Tensor) else leaf for leaf, known in columns]
        if not (share := self.news.get(index, 0.0)):
            return made
        pairs = zip(made, leaves, self._cond, strict=True)
        return [u + share * (c - last) if isinstance(u, Tensor) else u for u, c, last in pairs]

    def _averaged(self, inner: Callable[..., Any], number: int) -> Callable[..., Any]:
        """A cross-attention layer whose remembered output is of both halves, in a call of one."""

        @wraps(inner)
        def averaged(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if not self._halved or not self.session.skipping(number):
                return output
            return pytree.tree_map(lambda leaf: sum(leaf.chunk(2)) / 2 if isinstance(leaf, Tensor) else leaf, output)

        return averaged


def _minus(a: Any, b: Any) -> Any:
    return a - b if isinstance(a, Tensor) else a
