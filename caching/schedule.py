"""The optimal list of steps to compute, from one calibration trace, by dynamic programming (ours).

CacheQuant (arXiv 2503.01323) groups steps by how far features drift from the group's first; DPCache (arXiv 2602.22654)
lets the cost depend on the last two computed steps and the predictor. Here a group's cost is what it does to the
final latents: the squared norm of the summed, solver-weighted errors of its predicted outputs. All of it follows from
the T x T Gram matrix of the outputs, so a trace is kilobytes whatever the resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .predictors.damped import best_share, damped

Floats = NDArray[np.float64]
Predict = Callable[[int, Sequence[int]], Sequence[float]]
Weights = tuple[tuple[int, float], ...]


class Costs:
    """What it costs to skip the steps between two computed ones: |sum_t c_t (prediction_t - f_t)|^2 over the group.

    gram: inner products of the outputs f. predict: what the predictor makes at a step of the values computed at given
    steps, as factors of the newest of them. influence: c, 1 if None. ridge: None takes those factors p as they are;
    else the least-squares fit to the trace, min_w |sum_j w_j f_j - f|^2 + ridge * tr(G)/n * |w - p|^2, in closed form.
    damp: take of each forecast change, before that, the share that is best for the trace. longest: most steps skipped
    in a row. runs: the Gram matrix of each traced run; a group costs in `table` and `peak` what it does in the worst.
    """

    def __init__(
        self, gram: Floats, predict: Predict, influence: Floats | None = None, *, ridge: float | None = None,
        damp: bool = False, longest: int = 8, runs: Floats | None = None,
    ) -> None:  # fmt: skip
        self.gram, self.predict, self.ridge, self.damp, self.runs = gram, predict, ridge, damp, runs
        self.total = len(gram)
        self.influence = np.ones(self.total) if influence is None else influence
        self.longest = min(longest, self.total - 1)

    def weights(self, at: int, computed: Sequence[int]) -> Weights:
        """(computed step, factor) pairs that make the value of step `at` where these, of before it, were computed."""
        factors: Floats = np.asarray(self.predict(at, computed), dtype=np.float64)
        known = list(computed[len(computed) - len(factors) :])
        if self.damp:
            share = best_share(self.gram[np.ix_(known, known)], self.gram[known, at], factors.tolist())
            factors = np.asarray(damped(factors.tolist(), share))
        if self.ridge is not None:
            block = self.gram[np.ix_(known, known)]
            pull = self.ridge * float(np.trace(block)) / len(known)
            wanted = self.gram[known, at] + pull * factors
            factors = np.linalg.lstsq(block + pull * np.eye(len(known)), wanted, rcond=None)[0].astype(np.float64)
        return tuple((step, float(factor)) for step, factor in zip(known, factors, strict=True) if factor)

    def groups(self, computed: Sequence[int], end: int, grams: Floats | None = None) -> Floats:
        """Costs of skipping all after the last of the computed steps, up to each k-1 until end-1; 0 for the first k.
        grams: what to price them by, `gram` if None; of several matrices the costs are the largest."""
        last, priced = computed[-1], self.gram if grams is None else grams
        errors = np.zeros((end - last, self.total))
        for row, at in enumerate(range(last + 1, end), 1):
            errors[row, at] = -self.influence[at]
            for step, factor in self.weights(at, computed):
                errors[row, step] += self.influence[at] * factor
        summed = errors.cumsum(0)
        return np.maximum(0.0, ((summed @ priced) * summed).sum(-1).reshape(-1, len(summed)).max(0))

    def table(self) -> Floats:
        """All costs: [j, a, b] is the group after step j where j - a was computed before it (a = 0: none) and j + b is
        computed next (or the run ends there); infinite where a step is skipped that may not be."""
        width = self.longest + 1
        out = np.full((self.total, width + 1, width + 1), np.inf)
        for j in range(self.total):
            end = min(self.total, j + width)
            for a in range(1, min(j, width) + 1) if j else (0,):
                out[j, a, 1 : end - j + 1] = self.groups([j - a, j] if a else [j], end, self.runs)
        return out

    def price(self, steps: Sequence[int]) -> float:
        """What it costs to compute these steps only."""
        return sum(float(self.groups(known, end)[-1]) for known, end in spans(steps, self.total))

    def peak(self, steps: Sequence[int]) -> float:
        """What the worst group costs where these steps only are computed."""
        return max(float(self.groups(known, end, self.runs)[-1]) for known, end in spans(steps, self.total))

    def error(self, steps: Sequence[int]) -> float:
        """Predicted error of the final latents for these computed steps, relative to what the outputs make of them."""
        cost = self.price(steps)
        whole = float(self.influence @ self.gram @ self.influence)
        return float(np.sqrt(cost / whole)) if whole > 0 else 0.0


def spans(steps: Sequence[int], total: int) -> Iterator[tuple[Sequence[int], int]]:
    """For each computed step: all up to it, and the next one or the end of the run."""
    for count, end in enumerate([*steps[1:], total], 1):
        yield steps[:count], end


def fewest(total: int, longest: int, forced: Sequence[int]) -> int:
    """How many steps must be computed, at least those in `forced` and 0, with at most `longest` skipped in a row."""
    must = sorted({0, *forced})
    return len(must) + sum((end - known[-1] - 1) // (longest + 1) for known, end in spans(must, total))


def optimal_steps(
    table: Floats, budget: int, forced: Sequence[int] = (), *, shortest: int = 1, minimax: bool = False
) -> list[int]:
    """`budget` steps to compute, among them 0 and those in `forced`, at the least sum of group costs.

    table: as `Costs.table` makes it; O(budget T longest^2). shortest: least steps in a group, the computed one
    included, but for groups that a forced step or the end of the run cuts short. minimax: at the least cost of the
    worst group (a bottleneck path, as LeMiCa's, arXiv 2511.00090), and the least sum among those. Raises ValueError for
    a budget that is not possible.
    """
    if minimax:
        steps = _cheapest(table, budget, forced, shortest, np.maximum)
        worst = max(
            table[known[-1], known[-1] - known[-2] if len(known) > 1 else 0, end - known[-1]]
            for known, end in spans(steps, len(table))
        )
        table = np.where(table <= worst, table, np.inf)
    return _cheapest(table, budget, forced, shortest, np.add)


def _cheapest(table: Floats, budget: int, forced: Sequence[int], shortest: int, join: np.ufunc) -> list[int]:
    """`optimal_steps`, where `join` makes the cost of a list of those of two parts of it."""
    total, width = len(table), table.shape[1] - 1
    least = fewest(total, width - 1, forced)
    if not least <= budget <= total:
        raise ValueError(f"{budget} computed steps are not possible in a run of {total}; give {least} to {total}")
    allowed = table.copy()
    for step in forced:
        for b in range(2, width + 1):
            allowed[max(0, step - b + 1) : step, :, b] = np.inf
    for j in range(total):
        for b in range(1, min(shortest, total - j, width + 1)):
            if j + b not in forced:
                allowed[j, :, b] = np.inf
    best = np.full((total, width + 1), np.inf)  # best[j, a]: the last computed steps are j - a and j
    best[0, 0] = 0.0
    came_from: list[NDArray[np.intp]] = []
    for _ in range(budget - 1):
        reached = join(best[:, :, None], allowed)
        before, best = reached.min(1), np.full_like(best, np.inf)
        came_from.append(reached.argmin(1))
        for b in range(1, min(width, total - 1) + 1):
            best[b:, b] = before[: total - b, b]
    ends = np.full_like(best, np.inf)
    for j in range(max(0, total - width), total):
        ends[j] = join(best[j], allowed[j, :, total - j])
    if not np.isfinite(ends).any():
        raise ValueError(f"{budget} computed steps of {total} are not possible in groups of at least {shortest}")
    j, a = (int(x) for x in np.unravel_index(int(ends.argmin()), ends.shape))
    chosen = [j]
    for origin in reversed(came_from):
        chosen.append(j - a)
        j, a = j - a, int(origin[j - a, a])
    return sorted(chosen)


def shared_steps(
    parts: Sequence[Costs], budget: int, forced: Sequence[Sequence[int]], *, minimax: bool = False
) -> list[list[int]]:
    """`optimal_steps` of parts of a run that have a budget together and predict nothing of each other.

    forced: steps of each part. Raises ValueError for a budget that is not possible.
    """
    tables, join = [costs.table() for costs in parts], max if minimax else sum
    least = [fewest(costs.total, costs.longest, own) for costs, own in zip(parts, forced, strict=True)]
    best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}  # by steps computed so far
    for number, (costs, table, own) in enumerate(zip(parts, tables, forced, strict=True)):
        left = budget - sum(least[number + 1 :])
        counts = [*range(least[number], min(costs.total, left) + 1)]
        if number == len(parts) - 1:
            counts = [count for count in counts if budget - count in best]
        chosen = {count: optimal_steps(table, count, own, minimax=minimax) for count in counts}
        prices = {count: (costs.peak if minimax else costs.price)(steps) for count, steps in chosen.items()}
        reached: dict[int, tuple[float, list[list[int]]]] = {}
        for spent, (paid, before) in best.items():
            for count, more in prices.items():
                known, both = reached.get(spent + count), join((paid, more))
                if spent + count <= left and (known is None or both < known[0]):
                    reached[spent + count] = both, [*before, chosen[count]]
        best = reached
    if budget not in best:
        most = sum(costs.total for costs in parts)
        raise ValueError(f"{budget} computed steps are not possible in a run of {most}; give {sum(least)} to {most}")
    return best[budget][1]
