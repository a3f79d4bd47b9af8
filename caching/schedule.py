"""The optimal list of steps to compute, from one calibration trace, by dynamic programming (ours).

CacheQuant (arXiv 2503.01323) groups steps by how far features drift from the group's first; DPCache (arXiv 2602.22654)
lets the cost depend on the last two computed steps and the predictor. Here a group's cost is what it does to the
final latents: the squared norm of the summed, solver-weighted errors of its predicted outputs. All of it follows from
the T x T Gram matrix of the outputs, so a trace is kilobytes whatever the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .predictors import weights

Floats = NDArray[np.float64]


def step_weights(
    gram: Floats,
    at: int,
    anchors: Sequence[int],
    coordinates: Sequence[float],
    lebesgue_max: float,
    ridge: float | None,
) -> Floats:
    """Weights of the values at `anchors` that predict the one at `at`.

    ridge None: Lagrange on the run's own grid, order dropped beyond `lebesgue_max`. Else the least-squares fit to the
    trace, min_w |sum_j w_j f_j - f|^2 + ridge * tr(G)/k * |w - w_Lagrange|^2, in closed form.
    """
    prior = np.zeros(len(anchors))
    lagrange = weights(
        "adams_bashforth", len(anchors), lebesgue_max, coordinates[at], [coordinates[a] for a in anchors]
    )
    prior[len(anchors) - len(lagrange) :] = lagrange
    if ridge is None:
        return prior
    known = gram[np.ix_(anchors, anchors)]
    strength = ridge * np.trace(known) / len(anchors)
    return np.linalg.solve(known + strength * np.eye(len(anchors)), gram[anchors, at] + strength * prior)


def group_cost(gram: Floats, influence: Floats, errors: Sequence[tuple[int, Sequence[int], Floats]]) -> float:
    """|sum_t c_t (prediction_t - f_t)|^2 over one group of predicted steps; c_t is `influence`."""
    direction = np.zeros(len(gram))
    for at, anchors, found in errors:
        direction[at] -= influence[at]
        np.add.at(direction, list(anchors), influence[at] * found)
    return max(0.0, float(direction @ gram @ direction))


class Costs:
    """C[i, j, k]: cost of predicting steps j+1 .. k-1 when the last computed ones are i < j (i == j: only j)."""

    def __init__(
        self,
        gram: Floats,
        coordinates: Sequence[float],
        influence: Floats | None = None,
        *,
        lebesgue_max: float = 6.0,
        ridge: float | None = None,
        longest: int = 8,
    ) -> None:
        self.gram, self.coordinates = gram, coordinates
        self.total = len(gram)
        self.influence = np.ones(self.total) if influence is None else influence
        self.lebesgue_max, self.ridge, self.longest = lebesgue_max, ridge, longest

    def predictions(self, i: int, j: int, k: int) -> list[tuple[int, Sequence[int], Floats]]:
        """(step, anchors, weights) for each step of the group."""
        anchors = [j] if i == j else [i, j]
        return [
            (t, anchors, step_weights(self.gram, t, anchors, self.coordinates, self.lebesgue_max, self.ridge))
            for t in range(j + 1, k)
        ]

    def __call__(self, i: int, j: int, k: int) -> float:
        if k - j - 1 > self.longest:
            return float("inf")
        return group_cost(self.gram, self.influence, self.predictions(i, j, k))

    def table(self) -> Floats:
        """All costs, (T, T, T + 1); infinite where a group would be longer than `longest`."""
        out = np.full((self.total, self.total, self.total + 1), np.inf)
        for j in range(self.total):
            for i in range(j + 1):
                for k in range(j + 1, min(self.total, j + self.longest + 1) + 1):
                    out[i, j, k] = self(i, j, k)
        return out


def optimal_steps(costs: Floats, budget: int, forced: Sequence[int] = (0,)) -> list[int]:
    """`budget` steps to compute, at least those in `forced`, at the least sum of group costs; O(budget T^3).

    costs: (T, T, T + 1) as `Costs.table` makes it. Raises ValueError if the budget is below what is forced or what
    the longest group allows.
    """
    total = len(costs)
    must = np.zeros(total + 1, bool)
    must[list({0, *forced})] = True
    if not must.sum() <= budget <= total:
        raise ValueError(f"a budget of {budget} computed steps: between {int(must.sum())} and {total} are possible")
    allowed = costs.copy()
    for j in range(total):
        later = np.flatnonzero(must[j + 1 : total])
        if len(later):
            allowed[:, j, j + 2 + later[0] :] = np.inf
    best = np.full((total, total), np.inf)  # best[i, j]: computed steps end with i, j
    best[0, 0] = 0.0
    came_from: list[NDArray[np.intp]] = []
    for _ in range(budget - 1):
        reached = best[:, :, None] + allowed[:, :, :total]
        came_from.append(reached.argmin(0))
        best = reached.min(0)
    ends = best + allowed[:, :, total]
    i, j = (int(x) for x in np.unravel_index(int(ends.argmin()), ends.shape))
    if not np.isfinite(ends[i, j]):
        raise ValueError(f"a budget of {budget} computed steps leaves groups longer than allowed; compute more steps")
    chosen = [j]
    for previous in reversed(came_from):
        chosen.append(i)
        i, j = int(previous[i, j]), i
    return sorted(set(chosen))
