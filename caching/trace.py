"""What an uncached run looked like: the Gram matrix of its outputs, and how much each moves the final latents."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.clock import Run, StepClock

_SKETCH = 16384


class Trace:
    """Collects, over runs of the same length, the mean Gram matrix of the outputs given to `scheduler.step`.

    The outputs are those after guidance. They are compared in float64 after, where they are large, one fixed random
    projection to 16384 numbers an image (Johnson-Lindenstrauss: distances within about 1 %). `solver` is a copy of
    the scheduler as it was when the last run began.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.run: Run | None = None
        self.solver: Any = None
        self.images = 0
        self.gram: NDArray[np.float64] | None = None
        self._rows: list[Tensor] = []
        self._projection: tuple[Tensor, Tensor] | None = None
        clock.on_start.append(self._start)
        clock.on_output.append(self._output)
        clock.on_end.append(self._end)

    def _start(self, run: Run) -> None:
        if self.run is not None and run.sigmas != self.run.sigmas:
            raise ValueError(
                f"a trace of {self.run.total} steps cannot go on with a run on another grid of {run.total}"
            )
        self.run, self._rows = run, []
        self.solver = copy.deepcopy(self.clock.pipe.scheduler)

    def _output(self, index: int, output: Tensor) -> None:
        self._rows.append(self._sketch(output.detach().flatten(1)).double().cpu())

    def _sketch(self, flat: Tensor) -> Tensor:
        """Random signs summed into a fixed number of buckets (count sketch), the same for every step."""
        width = flat.shape[1]
        if width <= _SKETCH:
            return flat.float()
        if self._projection is None or len(self._projection[0]) != width:
            generator = torch.Generator().manual_seed(0)
            buckets = torch.randint(_SKETCH, (width,), generator=generator)
            signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
            self._projection = buckets.to(flat.device), signs.to(flat.device)
        buckets, signs = self._projection
        out = torch.zeros(len(flat), _SKETCH, device=flat.device)
        return out.index_add_(1, buckets, flat.float() * signs)

    def _end(self, run: Run) -> None:
        rows, self._rows = self._rows, []
        if len(rows) != run.total:
            return  # cut short: says nothing about the whole run
        stacked = torch.stack(rows, 1)  # images, steps, numbers
        total = (stacked @ stacked.mT).sum(0).numpy()
        count = len(stacked)
        self.gram = total / count if self.gram is None else (self.gram * self.images + total) / (self.images + count)
        self.images += count


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
