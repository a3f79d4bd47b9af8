"""Several steps of a denoiser in one forward (Faster Diffusion, https://arxiv.org/abs/2312.09608)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.batches import Batches, is_plain
from fastdiff.clock import Run, Step

from .protocols import Live
from .region import signature
from .seams import Seams, Unclear


class BatchedDecoding:
    """The denoiser's forward with the cached steps that follow in one batch, the present step first.

    The session's regions run on the present step's part of the batch, and hand on their value for it and their
    predictions for the others. What was decoded ahead answers the calls of those steps. The first key step of a run
    is computed by itself, and the steps after it in a forward that leaves the regions out: the two show what in the
    denoiser holds the batch. Where that cannot be told, each step is decoded by itself.
    """

    def __init__(self, session: Live, forward: Callable[..., Any], most: int) -> None:
        self.session, self.forward, self.most = session, forward, most
        self._batches = Batches(session.anatomy)
        self._answers: dict[tuple[int, int], tuple[Any, Any]] = {}  # (branch, step): signature of its call, output
        self._seams: dict[int, Seams] = {}  # by branch
        self._now: Seams | None = None  # of the present call, where it is of interest
        self._indices: Sequence[int] = ()  # the steps of the present forward
        self._left_out = False  # whether it leaves the regions out
        self._serial = False  # whether this run is decoded step by step
        self._share: float | None = None  # of the scheduler's timestep, that the denoiser is given; 0: of another
        self._units = [unit for region in session.regions for unit in region.units]
        for number, region in enumerate(session.regions):
            for unit in region.units:
                wrapper = partial(self._shared, unit=unit, number=number, last=unit is region.units[-1])
                session.patches.wrap_forward(unit, wrapper)
        session.clock.on_start.append(self._reset)
        session.clock.on_end.append(self._reset)

    def _reset(self, run: Run) -> None:
        self._answers.clear()
        self._seams.clear()
        self._share, self._serial = None, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.session.clock.now
        assert step is not None
        asked = _asked(args, kwargs)
        answer = self._answers.pop((step.branch, step.index), None)
        if answer is not None and answer[0] == asked:
            self.session.recorder.skipped()
            return answer[1]
        seams = self._seams.get(step.branch)
        if seams is None or seams.asked != asked:
            seams = self._seams[step.branch] = Seams(asked)
        ahead = self._following(step)
        if not ahead or self._serial or not self._decodable(step, args, kwargs):
            return self._alone(seams, args, kwargs)
        skipped = all(map(self.session.skipping, range(len(self.session.regions))))
        if seams.divides(self._units) or (skipped and seams.joins(self._units)):
            self._decode(seams, step, [step.index, *ahead], args, kwargs)
            return self._answers.pop((step.branch, step.index))[1]
        output = self._alone(seams, args, kwargs)
        if not skipped and seams.shown(self._units):
            self.session.commit(step.index)
            self._left_out = True
            try:  # two steps at least: one more is the same call again, and shows nothing
                self._decode(seams, step, ahead if len(ahead) > 1 else [*ahead, *ahead], args, kwargs)
            except Unclear:
                self._serial = True
                self.session.recorder.note(
                    "decoded step by step: it cannot be told what inside this denoiser holds the batch"
                )
            finally:
                self._left_out = False
        return output

    def _alone(self, seams: Seams, args: tuple, kwargs: dict) -> Any:
        """One step; it shows what enters and leaves the regions' modules."""
        if not seams.shown(self._units):
            seams.restart()
            self._now, self._indices = seams, ()
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._now = None

    def _decode(self, seams: Seams, step: Step, indices: Sequence[int], args: tuple, kwargs: dict) -> None:
        """Answers for all of these steps from one forward."""
        many = self._arguments(step, indices, args, kwargs)
        self._now, self._indices = seams, indices
        try:
            output = self.forward(*many[0], **many[1])
        finally:
            self._now = None
        outputs = self._split(output, len(indices), len(indices) * self._batches.size(args, kwargs))
        for index, own in zip(indices, outputs, strict=True):
            self._answers[step.branch, index] = seams.asked, own

    def _following(self, step: Step) -> Sequence[int]:
        """The cached steps right after this one."""
        mask = self.session.masks[0]
        assert mask is not None
        end = step.index + 1
        while end < len(mask) and end - step.index < self.most and not mask[end]:
            end += 1
        return range(step.index + 1, end)

    def _decodable(self, step: Step, args: tuple, kwargs: dict) -> bool:
        """Whether the arguments of the calls of other steps are known, and can be put into one call."""
        named = self._batches.named(args, kwargs)
        why = self._unforeseen(step, named)
        if why is None and (name := self._batches.unknown(args, kwargs)) is not None:
            why = f"not all inputs of this denoiser are known to have the batch first: {name}"
        if why is not None:
            self.session.recorder.note(f"decoded step by step: {why}")
        return why is None

    def _unforeseen(self, step: Step, named: dict[str, Any]) -> str | None:
        """Why the arguments of later steps are not those of this one with other timesteps, if so."""
        if self._share is None:
            self._share = _share(named.get("timestep"), step.run.timesteps[step.index])
        if not self._share:
            return "the denoiser is not given the scheduler's timesteps"
        told = [name for name, value in named.items() if value is not None]
        if self.session.anatomy.family.kind == "transformer":
            control = any("controlnet" in name for name in told)
            return "a ControlNet adds to the streams between the blocks" if control else None
        control = any("additional_residual" in name for name in told)
        heard = not all(region.hides_control for region in self.session.regions)
        return "a ControlNet is heard at every step" if control and heard else None

    def _arguments(self, step: Step, indices: Sequence[int], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of all the steps' calls in one."""
        count, batch = len(indices), self._batches.size(args, kwargs)
        given = torch.as_tensor(self._batches.named(args, kwargs)["timestep"])
        args, kwargs = self._batches.change(
            args, kwargs, lambda own: torch.cat([own] * count) if isinstance(own, Tensor) else own * count
        )
        assert self._share
        times = [step.run.timesteps[index] * self._share for index in indices]
        own = [torch.full((batch,), time, device=given.device) for time in times]  # made there: a list would be a wait
        many = torch.cat(own).to(given.dtype)
        if given.ndim > 1:  # one for each token
            many = many.view(-1, *[1] * (given.ndim - 1)).expand(-1, *given.shape[1:])
        return self._batches.replaced(args, kwargs, "timestep", many)

    def _split(self, output: Any, count: int, rows: int) -> list[Any]:
        """The outputs of the single steps. Raises Unclear where they do not have the batch first."""
        leaves, form = pytree.tree_flatten(output)
        if any(leaf.shape[:1] != (rows,) if isinstance(leaf, Tensor) else not is_plain(leaf) for leaf in leaves):
            raise Unclear
        parts = [leaf.chunk(count) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
        return [pytree.tree_unflatten(list(own), form) for own in zip(*parts, strict=True)]

    def _shared(self, inner: Callable[..., Any], unit: nn.Module, number: int, last: bool) -> Callable[..., Any]:
        """A module of a region: the present step's part goes in, all steps' parts come out."""

        @wraps(inner)
        def shared(*args: Any, **kwargs: Any) -> Any:
            seams, session, indices = self._now, self.session, self._indices
            if seams is None:
                return inner(*args, **kwargs)
            if not indices:
                output = inner(*args, **kwargs)
                seams.first_call(unit, (args, kwargs), output)
                return output
            if self._left_out:
                seams.compare(unit, (args, kwargs), len(indices))
                if last:
                    return seams.joined(unit, [session.predicted(number, index) for index in indices])
                return seams.unread(unit, len(indices))
            if not session.skipping(number):
                args, kwargs = seams.own(unit, (args, kwargs))
            own = pytree.tree_leaves(inner(*args, **kwargs))
            if not last:
                return seams.joined(unit, [own] * len(indices))
            session.commit(indices[0])
            return seams.joined(unit, [own, *(session.predicted(number, index) for index in indices[1:])])

        return shared


def _asked(args: tuple, kwargs: dict) -> Any:
    """What calls have to have alike for one to be answered by what was decoded in another, but for the timestep."""
    told = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
    return signature(args, kwargs), told


def _share(asked: Any, own: float) -> float:
    """The timestep that the denoiser is given as a share of the scheduler's, 1 or 1/1000; 0 where it is neither. Asked
    once a run, and not at the last level of noise, where 0 is a share of anything."""
    if asked is None:
        return 0.0
    given = torch.as_tensor(asked).flatten().tolist()
    fits = [share for share in (1.0, 1e-3) if abs(given[0] - own * share) <= 1e-3 * max(abs(given[0]), 1e-9)]
    return fits[0] if fits and min(given) == max(given) else 0.0
