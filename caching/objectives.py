"""What a plan of `dp` makes least, in the place of the sum of squared errors: MeanCache's objective, and LeMiCa's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .schedule import Costs, Floats

SHARPNESS = 4.0  # of MeanCache's lists, as others rebuilt them


class MeanVelocity(Costs):
    """How far the mean velocity of a group is off, with peaks suppressed: MeanCache, https://arxiv.org/abs/2601.19961.

    A group from the computed step j up to the next one k has the deviation e = |sum_i c_i (p_i - f_i)| / sum_i |c_i|,
    over its steps i from j to k - 1: for Euler's method c_i is the step in sigma, and e the error of the mean velocity
    between the two. It costs exp(4 e / m) - 1, m the largest deviation of all groups; the authors normalise in a way
    that they do not tell, and their exp(..) without the 1 has the same plans, for a budget fixes how many groups there
    are.
    """

    def table(self) -> Floats:
        squared = super().table()
        ends = np.concatenate([[0.0], np.abs(self.influence).cumsum()])
        starts = np.arange(self.total)[:, None]
        until = np.minimum(starts + np.arange(squared.shape[2])[None, :], self.total)
        length = np.maximum(ends[until] - ends[starts], np.finfo(np.float64).tiny)
        deviation: Floats = np.sqrt(squared) / length[:, None, :]
        largest = float(deviation[np.isfinite(deviation)].max(initial=0.0))
        return np.expm1(SHARPNESS * deviation / largest) if largest > 0 else deviation


def least_worst(edges: Mapping[tuple[int, int], float], total: int, budget: int, forced: Sequence[int]) -> list[int]:
    """`budget` steps to compute of `total`, among them 0 and those in `forced`, by LeMiCa's order,
    https://arxiv.org/abs/2511.00090: the worst group as good as possible, then the second worst, and so on.

    edges: by computed step and the next one (or the end of the run), what leaving out all between them costs; a pair
    that is missing is not allowed, but for neighbours, which leave out nothing. Lists of as many costs, sorted, keep
    their order when each gets the same cost more, so that the best way to a step is part of the best way over it.
    Raises ValueError for a budget that is not possible.
    """

    def cost(step: int, end: int) -> float | None:
        if any(step < must < end for must in forced):
            return None
        return 0.0 if end == step + 1 else edges.get((step, end))

    best: dict[int, tuple[list[float], list[int]]] = {0: ([], [0])}  # by the last step: costs, the worst first
    for count in range(1, budget + 1):
        reached: dict[int, tuple[list[float], list[int]]] = {}
        for step, (paid, steps) in best.items():
            for end in range(step + 1, total) if count < budget else (total,):
                more = cost(step, end)
                if more is None:
                    continue
                found = sorted([*paid, more], reverse=True), [*steps, end]
                reached[end] = min(reached.get(end, found), found)
        best = reached
    if total not in best:
        raise ValueError(f"{budget} computed steps are not possible in a run of {total} with these guards")
    return best[total][1][:-1]
