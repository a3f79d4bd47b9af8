"""The teacher's fine trajectories, and pictures drawn on other grids, each step settled for all of them at once."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .combine import At
from .grid import costs
from .levels import Levels, put
from .lockstep import Dress, loops, twin
from .replay import Outputs, Replay

Calls = Sequence[Mapping[str, Any]]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Trial:
    """How pictures are drawn: the pipeline as it was before anything was installed, a scheduler of one evaluation a
    step, the calls, each of a few pictures, and the denoisers. `tick` is told of every step of a call; `dress` puts
    a lever on a run that sets its levels itself."""

    pipe: Any
    scheduler: Any
    calls: Callable[[], Calls]  # anew each time, since a call uses its generators up
    denoisers: Sequence[nn.Module] = ()
    tick: Tick = lambda: None
    dress: Dress | None = None

    def students(
        self, places: Sequence[float], keep: int, settle: Callable[[int, list[list[At]]], list[Tensor]],
        known: Outputs | None = None, until: int = 0,
    ) -> tuple[Tensor, Outputs]:  # fmt: skip
        """The last latents of all pictures, (S, ...), drawn on a grid, and all that the denoisers gave; their outputs
        of the steps before `until` are taken from `known`, a draw with the same levels up to there.

        settle(step, seen): the latents that each call goes on with, of the newest `keep` steps of each, newest last.
        """
        states: list[Tensor] = []
        replay = Replay(known or {}, until)
        if self.dress is None:
            made = loops(self.pipe, lambda: on_grid(self.scheduler, places), self.calls())
        else:
            made = loops(self.pipe, lambda: copy.deepcopy(self.scheduler), self.calls(), self.dress)
        with replay.on(self.denoisers), made as running:
            seen: list[list[At]] = [[] for _ in running]
            for index in range(len(places) - 1):
                for number, loop in enumerate(running):
                    replay.at(number, index)
                    at = loop.advance(states[number] if index else None)
                    assert at is not None, "the pipeline's loop has fewer steps than its scheduler"
                    seen[number] = [*seen[number], at][-keep:]
                    self.tick()
                states = settle(index, seen)
            return torch.cat(states), replay.made

    def stock(self, scheduler: Any, steps: int) -> Tensor:
        """The last latents of all pictures, drawn by a stock scheduler in its own way."""
        found = []
        for call in self.calls():
            own = twin(self.pipe, copy.deepcopy(scheduler))
            given = {**call, "num_inference_steps": steps}
            found.append(own(given.pop("prompt"), output_type="latent", **given)[0])
        return torch.cat(found)


@dataclass
class Teacher:
    """Trajectories along a fine grid: `states` (points, S, values) in a file, `gram` the mean over pictures of the
    products of all states and then all outputs, divided by the number of values."""

    places: list[float]
    states: Tensor
    gram: NDArray[np.float64]
    levels: Levels
    shape: tuple[int, ...] = ()

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """Of steps between its points: `grid.costs`."""
        return costs(self.gram)

    def goal(self, point: int, like: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's states at a point, in the pieces and shapes of `like`."""
        pieces = self.states[point].split([len(part) for part in like])
        return [piece.view_as(part).to(part) for piece, part in zip(pieces, like, strict=True)]


@contextmanager
def taught(trial: Trial, places: Sequence[float], pictures: int) -> Iterator[Teacher]:
    """Draw all pictures on the fine grid with the scheduler's own steps, one call after the other; the file is gone at
    the end."""
    heard: list[Levels] = []
    states: Any = None
    gram: Any = None
    shape: tuple[int, ...] = ()
    done = 0
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
        for call in trial.calls():
            rows, outputs = [], []
            with loops(trial.pipe, lambda: on_grid(trial.scheduler, places, heard.append), [call]) as [loop]:
                while (at := loop.advance()) is not None:
                    rows.append(_row(at.x))
                    outputs.append(_row(at.f))
                    last = at.plain
                    trial.tick()
            rows.append(_row(last))
            count, values = rows[0].shape
            if states is None:
                shape = tuple(last.shape[1:])
                states = in_file(folder, len(places), pictures, values)
            states[:, done : done + count] = torch.stack(rows)
            parts = torch.stack([*rows, *outputs], 1).double()
            summed = (parts @ parts.transpose(1, 2)).sum(0) / values
            gram, done = summed if gram is None else gram + summed, done + count
        yield Teacher(list(places), states, (gram / done).numpy(), heard[0], shape)


def in_file(folder: str, *shape: int) -> Tensor:
    """Numbers of float32 in a file of that folder instead of in memory."""
    return torch.from_file(f"{folder}/numbers", shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)


def _row(value: Tensor) -> Tensor:
    return value.flatten(1).float().cpu()


def on_grid(scheduler: Any, places: Sequence[float], seen: Callable[[Levels], None] = lambda _: None) -> Any:
    """A copy of a scheduler that sets these places whatever it is asked for."""
    made = copy.deepcopy(scheduler)
    stock = made.set_timesteps

    @wraps(stock)
    def set_timesteps(
        num_inference_steps: Any = None, device: Any = None, *_: Any, mu: float | None = None, **__: Any
    ) -> None:
        stock(len(places) - 1, device=device, **({} if mu is None else {"mu": mu}))
        seen(put(made, places, mu, device))

    made.set_timesteps = set_timesteps
    return made
