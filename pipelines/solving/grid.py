"""The noise levels at which so many evaluations are worth most, by dynamic programming on the teacher's trajectories.

The cost of a step from one level to another is what the best weights of the last two outputs and latents leave of the
teacher's own state there, which sums of products tell for every three levels. Related: GITS,
https://arxiv.org/abs/2405.11326, which takes Euler's error for it, whatever the solver.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_RIDGE = 1e-9  # of the mean square, so that two levels of nearly the same output can be told apart


def costs(gram: Floats) -> Floats:
    """cost[a, b, j] of the step from point b to j with what was seen at a and b; infinite but for a < b < j.

    gram: (2 P - 1, 2 P - 1) products of the states at P points and then of the outputs at all of them but the last.
    cost[b, b, j] is that of a first step, which has seen b alone.
    """
    points = (len(gram) + 1) // 2
    found = np.full((points, points, points), np.inf)
    for b in range(points - 1):
        later = np.arange(b + 1, points)
        found[b, b, b + 1 :] = _left(gram, np.array([[points + b, b]]), later)[0]
        if b:
            earlier = np.arange(b)
            seen = np.stack([np.full(b, points + b), points + earlier, np.full(b, b), earlier], 1)
            found[:b, b, b + 1 :] = _left(gram, seen, later)
    return found


def _left(gram: Floats, seen: NDArray[np.int64], wanted: NDArray[np.int64]) -> Floats:
    """What the best sum of each row of `seen` leaves of each of `wanted`, (rows, wanted)."""
    square = gram[seen[:, :, None], seen[:, None, :]]
    size = np.trace(square, axis1=1, axis2=2)[:, None, None] / seen.shape[1]
    cross = gram[seen[:, :, None], wanted[None, None, :]]
    weights = np.linalg.solve(square + _RIDGE * size * np.eye(seen.shape[1]), cross)
    return np.maximum(np.diagonal(gram)[wanted] - (weights * cross).sum(1), 1e-15)


def best(cost: Floats, evaluations: int) -> list[int]:
    """The points of a run of so many evaluations, the first one's to the end, of least summed cost."""
    points = len(cost)
    total = np.full((points, points), np.inf)  # by the last two points
    total[0] = cost[0, 0]
    back: list[NDArray[np.int64]] = []
    for _ in range(evaluations - 1):
        through = total[:, :, None] + np.where(np.eye(points, dtype=bool)[:, :, None], np.inf, cost)
        back.append(through.argmin(0))
        total = through.min(0)
    last = int(total[:, -1].argmin())
    path = [points - 1, last]
    for came in reversed(back):
        path.append(int(came[path[-1], path[-2]]))
    return path[::-1]
