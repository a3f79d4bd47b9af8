"""What an uncached run looked like: the Gram matrix of its outputs, and how much each moves the final latents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.affine import wide
from fastdiff.clock import Run, StepClock
from fastdiff.listening import unheard

from .protocols import Sample
from .region import tensors

_SKETCH = 16384


class Gram:
    """Mean Gram matrix of the rows of any number of runs: inner products of what each step gave, summed over numbers.

    Rows are compared in float64 after, where they are long, one fixed random projection to 16384 numbers an image
    (Johnson-Lindenstrauss: distances within about 1 %).
    """

    def __init__(self) -> None:
        self.images = 0
        self.matrix: NDArray[np.float64] | None = None
        self._runs: list[NDArray[np.float64]] = []
        self._projection: tuple[Tensor, Tensor] | None = None

    def sketch(self, value: Tensor) -> Tensor:
        """(images, numbers): random signs summed into a fixed number of buckets (count sketch), the same each time."""
        flat = value.detach().flatten(1)
        width = flat.shape[1]
        if width <= _SKETCH:
            return wide(flat).cpu()
        if self._projection is None or len(self._projection[0]) != width:
            generator = torch.Generator().manual_seed(0)
            buckets = torch.randint(_SKETCH, (width,), generator=generator)
            signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
            self._projection = buckets.to(flat.device), signs.to(flat.device)
        buckets, signs = self._projection
        out = torch.zeros(len(flat), _SKETCH, device=flat.device)
        return wide(out.index_add_(1, buckets, flat.float() * signs)).cpu()

    def add(self, rows: list[Tensor]) -> None:
        """The sketches of one run, a step each."""
        stacked = torch.stack(rows, 1)  # images, steps, numbers
        self._runs.append((stacked @ stacked.mT).numpy())
        total, count = self._runs[-1].sum(0), len(stacked)
        old = self.matrix
        self.matrix = total / count if old is None else (old * self.images + total) / (self.images + count)
        self.images += count

    @property
    def runs(self) -> NDArray[np.float64]:
        """The matrix of each image, (images, steps, steps)."""
        return np.concatenate(self._runs)


class Trace:
    """Collects, over runs of the same steps, the Gram matrix of the outputs given to `scheduler.step`.

    The outputs are those after guidance. `solver` is a copy of the scheduler as it was when the last run began. Only
    complete runs count, and of those the ones that `counts` says are of interest.
    """

    def __init__(self, clock: StepClock, counts: Callable[[Run], bool] = lambda run: True) -> None:
        self.clock, self.counts = clock, counts
        self.run: Run | None = None
        self.solver: Any = None
        self._gram = Gram()
        self._begun: Any = None
        self._rows: dict[int, Tensor] = {}  # by step: of two outputs that a solver is given, the last
        clock.on_start.append(self._start)
        clock.on_output.append(lambda index, output: self._rows.__setitem__(index, self._gram.sketch(output)))
        clock.on_end.append(self._end)

    @property
    def gram(self) -> NDArray[np.float64] | None:
        return self._gram.matrix

    @property
    def images(self) -> int:
        return self._gram.images

    @property
    def runs(self) -> NDArray[np.float64]:
        return self._gram.runs

    def _start(self, run: Run) -> None:
        self._rows, self._begun = {}, unheard(self.clock.scheduler)

    def _end(self, run: Run) -> None:
        rows, self._rows = self._rows, {}
        if len(rows) != run.total or not self.counts(run):  # one cut short says nothing about the whole run
            return
        if self.run is not None and run.sigmas != self.run.sigmas:
            raise ValueError(
                f"a trace of {self.run.total} steps cannot go on with a run on another grid of {run.total}"
            )
        self.run, self.solver = run, self._begun
        self._gram.add([rows[index] for index in range(run.total)])


class SiteTrace:
    """The Gram matrix of what a region gave, over the runs and branches that a `Recording` session shows.

    `steps` are those in which the region was called; a run or a branch that was called in fewer says nothing.
    """

    def __init__(self) -> None:
        self.steps: tuple[int, ...] = ()
        self._gram = Gram()
        self._rows: dict[int, dict[int, Tensor]] = {}  # of the present run, by branch and step
        self._number = 0

    def seen(self, sample: Sample) -> None:
        step = sample.step
        if step.run.number != self._number:
            self._close()
            self._number = step.run.number
        leaves = [leaf.flatten(1).float() for leaf in tensors(sample.value)]
        self._rows.setdefault(step.branch, {})[step.index] = self._gram.sketch(torch.cat(leaves, 1))

    def _close(self) -> None:
        rows, self._rows = self._rows, {}
        for own in rows.values():
            steps = tuple(sorted(own))
            if len(steps) > len(self.steps):
                self.steps, self._gram = steps, Gram()
            if steps == self.steps:
                self._gram.add([own[index] for index in steps])

    @property
    def gram(self) -> NDArray[np.float64]:
        self._close()
        if self._gram.matrix is None:
            raise ValueError("no complete run was traced")
        return self._gram.matrix

    @property
    def runs(self) -> NDArray[np.float64] | None:
        """The matrix of each image and branch; None where no complete run was traced."""
        self._close()
        return self._gram.runs if self._gram.images else None


def influence(solver: Any, run: Run) -> NDArray[np.float64]:
    """c_t: how much the final latents change per unit of the output at step t, for a solver linear in its outputs.

    solver: a scheduler as it was when the run began (`Trace.solver`); it is copied, not changed. c is its impulse
    response; what the model itself would make of the changed latents is left out. Raises ValueError for a solver that
    adds noise or is not linear.
    """
    name = type(solver).__name__

    def final(outputs: Tensor) -> Tensor:
        """Final latents, one column an experiment, of a run from zero latents; outputs is (steps, experiments)."""
        own = copy.deepcopy(solver)
        latents = torch.zeros(1, 1, 1, outputs.shape[1], dtype=torch.float64)
        for row, timestep in zip(outputs, own.timesteps[-run.total :], strict=True):
            try:
                latents = own.step(row.view(1, 1, 1, -1), timestep, latents, return_dict=False)[0].double()
            except TypeError:
                raise ValueError(f"{name}.step needs more than the output, the timestep and the latents") from None
        return latents.flatten()

    impulses = torch.eye(run.total, dtype=torch.float64)
    once, twice = final(impulses), final(2 * impulses)
    scale = float(once.abs().max())
    if not torch.isfinite(once).all() or not torch.allclose(2 * once, twice, rtol=1e-3, atol=1e-6 * scale):
        raise ValueError(f"{name} is not linear in the model's outputs, or adds noise of its own")
    return once.numpy()
