"""Several steps of a denoiser in one forward (Faster Diffusion, https://arxiv.org/abs/2312.09608)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.anatomy import parameters
from fastdiff.clock import Run, Step

from .batches import Batches
from .protocols import Live
from .region import signature


class BatchedDecoding:
    """The denoiser's forward with the cached steps that follow in one batch, the present step first.

    The session's regions run on the present step's part of the batch, and hand on their value for it and their
    predictions for the others. What was decoded ahead answers the calls of those steps.
    """

    def __init__(self, session: Live, forward: Callable[..., Any], most: int) -> None:
        self.session, self.forward, self.most = session, forward, most
        self._ahead: Sequence[int] = ()
        self._batches = Batches(session.anatomy, parameters(session.anatomy.denoiser))
        self._batch = 0
        self._answers: dict[tuple[int, int], tuple[Any, Any]] = {}  # (branch, step): signature of its call, output
        self._linear: bool | None = None
        for number, region in enumerate(session.regions):
            for unit in region.units:
                wrapper = partial(self._shared, number=number, last=unit is region.units[-1])
                session.patches.wrap_forward(unit, wrapper)
        session.clock.on_start.append(self._reset)
        session.clock.on_end.append(self._reset)

    def _reset(self, run: Run) -> None:
        self._answers.clear()
        self._linear = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.session.clock.now
        assert step is not None
        asked = signature(args, kwargs)
        answer = self._answers.pop((step.branch, step.index), None)
        if answer is not None and answer[0] == asked:
            self.session.recorder.skipped()
            return answer[1]
        self._ahead = self._following(step, args, kwargs)
        many = self._many(step, args, kwargs) if self._ahead else None
        if many is None:
            self._ahead = ()
            return self.forward(*args, **kwargs)
        try:
            outputs = self._split(self.forward(*many[0], **many[1]))
        finally:
            self._ahead = ()
        for index, output in zip(self._indices, outputs, strict=True):
            self._answers[step.branch, index] = asked, output
        return self._answers.pop((step.branch, step.index))[1]

    def _following(self, step: Step, args: tuple, kwargs: dict) -> Sequence[int]:
        """The cached steps right after this one."""
        mask = self.session.masks[0]
        assert mask is not None
        end = step.index + 1
        while end < len(mask) and end - step.index < self.most and not mask[end]:
            end += 1
        found = range(step.index + 1, end)
        return found if found and self._knows_times(step, args, kwargs) else ()

    def _knows_times(self, step: Step, args: tuple, kwargs: dict) -> bool:
        """Whether the timestep the denoiser is given is the scheduler's, or a fixed share of it; looked at once a run,
        and not at the last level of noise, where 0 is a share of anything."""
        if self._linear is None:
            asked = _timestep(args, kwargs)
            given = float("nan") if asked is None else float(torch.as_tensor(asked).flatten()[0])
            own = step.run.timesteps[step.index]
            self._linear = any(abs(given - own * share) <= 1e-3 * max(abs(given), 1e-9) for share in (1.0, 1e-3))
            self._share = 1e-3 if self._linear and abs(given - own) > 1e-3 * max(abs(given), 1e-9) else 1.0
            if not self._linear:
                self.session.recorder.note("decoded step by step: the denoiser is not given the scheduler's timesteps")
        return self._linear

    def _many(self, step: Step, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments of all the steps' calls in one; None where they are not built so that this can be done."""
        control = any("controlnet" in name and value is not None for name, value in kwargs.items())
        if control and self.session.anatomy.family.kind == "transformer":  # whose inner streams hold one step only
            self.session.recorder.note("decoded step by step: a ControlNet adds to the streams between the blocks")
            return None
        self._indices = [step.index, *self._ahead]
        count, self._batch = len(self._indices), self._batches.size(args, kwargs)
        many = self._batches.change(args, kwargs, self._batch, lambda leaf: torch.cat([leaf] * count))
        if many is None:
            self.session.recorder.note("decoded step by step: not all inputs of this denoiser have the batch first")
            return None
        args, kwargs = many
        given = torch.as_tensor(_timestep(args, kwargs))
        times = [step.run.timesteps[index] * self._share for index in self._indices]
        timestep = torch.tensor(times, device=given.device).to(given.dtype).repeat_interleave(self._batch)
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": timestep}
        return (args[0], timestep, *args[2:]), kwargs

    def _split(self, output: Any) -> list[Any]:
        """The outputs of the single steps."""
        count = len(self._indices)
        leaves, form = pytree.tree_flatten(output)
        parts = [leaf.chunk(count) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
        return [pytree.tree_unflatten(list(own), form) for own in zip(*parts, strict=True)]

    def _shared(self, inner: Callable[..., Any], number: int, last: bool) -> Callable[..., Any]:
        """A module of a region: the present step's part goes in; at the region's end, all steps' parts come out."""

        @wraps(inner)
        def shared(*args: Any, **kwargs: Any) -> Any:
            if not self._ahead:
                return inner(*args, **kwargs)
            args, kwargs = pytree.tree_map(self._own, (args, kwargs))
            output = inner(*args, **kwargs)
            if not last:
                return output
            self.session.commit(self._indices[0])
            later = [self.session.predicted(number, index) for index in self._ahead]
            leaves, form = pytree.tree_flatten(output)
            joined = [
                torch.cat(own) if isinstance(own[0], Tensor) else own[0] for own in zip(leaves, *later, strict=True)
            ]
            return pytree.tree_unflatten(joined, form)

        return shared

    def _own(self, leaf: Any) -> Any:
        """The part of an input that is the present step's; a UNet for video folds its frames into the batch."""
        count = 1 + len(self._ahead)
        whole = count * self._batch
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        folds = self.session.anatomy.family.kind == "unet"
        if leaf.shape[0] == whole or (folds and leaf.shape[0] % whole == 0):
            return leaf[: leaf.shape[0] // count]
        return leaf


def _timestep(args: tuple, kwargs: dict) -> Any:
    return kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None
