"""All weights of a plan moved at once, by a step of Gauss and Newton, to where the pictures end nearest to the
teacher's.

Weights that are fitted step after step take each state to the teacher's, and know nothing of what the model makes of
the error that is left. Here each weight is varied a little and the pictures are drawn to their end, which tells what it
does through all later outputs of the model; least squares then move all weights together. Bespoke non-stationary
solvers (https://arxiv.org/abs/2403.01329) look for such weights by gradient descent, which needs the model's
derivative.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from .candidates import Candidate, distance, held_out
from .combine import At, counts, onward, parts
from .fit import Products, solve
from .replay import Outputs
from .students import Teacher, Trial, in_file

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # how far the weights go is left to the pictures held out
_NUDGE = 1e-3  # of the latents' norm, by which a state is moved to see what that does; coarser where numbers are

Weights = Sequence[Sequence[float]]


def draws(evaluations: int, order: int) -> int:
    """How often `polished` draws all pictures."""
    return 1 + sum(sum(counts(step, order)) for step in range(evaluations)) + len(RIDGES)


def polished(trial: Trial, teacher: Teacher, best: Candidate) -> Candidate:
    """A candidate with weights moved so, or the very same if the pictures left out of the fit end no nearer for it.

    A draw for each weight begins at its step: outputs of the steps before are those of `best`.
    """
    held, count = held_out(teacher.states.shape[1]), len(best.weights)
    own = [[*w, *[0.0] * (sum(counts(step, best.order)) - len(w))] for step, w in enumerate(best.weights)]
    nudges: list[list[float]] = []
    end, _ = _drawn(trial, best, own, count, nudges)
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
        columns = in_file(folder, sum(map(len, own)), *end.shape)
        places = [(step, k) for step, weights in enumerate(own) for k in range(len(weights))]
        for column, (step, k) in zip(columns, places, strict=True):
            varied = [[*weights] for weights in own]
            varied[step][k] += nudges[step][k]
            column.copy_(_drawn(trial, best, varied, step + 1)[0] - end)
        wanted = teacher.states[-1] - end
        each = range(len(end))
        found = Products.cat([Products.of([c[s : s + 1] for c in columns], wanted[s : s + 1]) for s in each])
    fit, nearest = found.at(~held), best
    for ridge in RIDGES:
        moves = iter(solve(fit, torch.zeros(len(places), dtype=torch.float64), ridge).tolist())
        moved = tuple(
            tuple(w + size * next(moves) for w, size in zip(*one, strict=True)) for one in zip(own, nudges, strict=True)
        )
        last, outputs = _drawn(trial, best, moved)
        one = Candidate("fitted", distance(last, teacher), best.points, best.places, moved, best.order, outputs)
        nearest = max(nearest, one, key=lambda some: some.psnr(held))  # the outputs of others are let go
    return nearest


def _drawn(
    trial: Trial, best: Candidate, weights: Weights, until: int = 0, nudges: list[list[float]] | None = None
) -> tuple[Tensor, Outputs]:
    """The last latents of all pictures, (S, values), drawn with other weights, and the model's outputs, of which those
    before step `until` are those of `best`. nudges: is given by how much each weight is to be varied."""

    def settle(index: int, seen: list[list[At]]) -> list[Tensor]:
        if nudges is not None:
            nudges.append(_nudges(seen, best.order))
        return [onward(steps, weights[index], best.order) for steps in seen]

    last, outputs = trial.students(best.places, best.order, settle, best.outputs, until)
    return last.flatten(1).float().cpu(), outputs


def _nudges(seen: list[list[At]], order: int) -> list[float]:
    fine = max(_NUDGE, 4 * torch.finfo(seen[0][-1].x.dtype).eps)
    size = torch.stack([steps[-1].x.float().norm() for steps in seen]).norm()
    of = torch.stack([torch.stack([part.float().norm() for part in parts(steps, order)]) for steps in seen])
    return (fine * size / of.norm(dim=0).clamp_min(1e-12)).tolist()
