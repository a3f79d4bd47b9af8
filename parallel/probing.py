"""How far one layer's old values move the output of a denoiser: measured by all ranks, in the runs of a calibration."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.affine import wide
from fastdiff.anatomy import Anatomy
from fastdiff.clock import StepClock
from fastdiff.errors import BadConfig
from fastdiff.patch import PatchSet

from .bus import Bus
from .displaced import Displaced
from .exchange import Exchange
from .split import Split
from .waiting import Table


class Probe:
    """In a cache's place around a denoiser whose layers all wait: at `moments` steps spread over those that the method
    displaces, the call is made again for each layer, with that layer's values of the others a step old."""

    regions = ()  # what a cache would leave out

    def __init__(self, anatomy: Anatomy, clock: StepClock, bus: Callable[[], Bus], method: Displaced, moments: int):
        self.anatomy, self.clock, self.bus, self.method, self.moments = anatomy, clock, bus, method, moments
        self.errors: dict[str, list[float]] = defaultdict(list)
        self.sizes: Counter[str] = Counter()

    def attach(self, patches: PatchSet) -> None:
        """Nothing goes around the blocks."""

    def forget(self) -> None:
        """Nothing is remembered between calls."""

    def attach_denoiser(self, patches: PatchSet) -> None:
        def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def probed(*args: Any, **kwargs: Any) -> Any:
                split = next(one for one in self.bus().splits if one.root is self.anatomy.denoiser)
                for exchange in split.exchanges:
                    exchange.waits = True
                step = self.clock.now
                if step is None or step.index not in self._chosen(step.run.total):
                    return forward(*args, **kwargs)
                return self._looked(split, lambda: forward(*_copied(args), **_copied(kwargs)))

            return probed

        patches.wrap_forward(self.anatomy.denoiser, wrapper)

    def table(self, pictures: int) -> Table:
        """By layer: the mean relative squared error over calls and ranks, and the bytes that the rank which sends most
        sends for it in a step, for each of the pictures that all runs drew. Raises BadConfig where no layer talked."""
        if not self.errors:
            raise BadConfig("no layer of these runs asks other ranks for anything: there is nothing to choose")
        told = self.bus().tell((dict(self.errors), self.sizes))
        found = {}
        for name in self.errors:
            errors = [error for all_errors, _ in told for error in all_errors[name]]
            most = max(sizes[name] for _, sizes in told)
            found[name] = (sum(errors) / len(errors), math.ceil(most / self.moments / pictures))
        return found

    def _chosen(self, total: int) -> set[int]:
        stale = [
            i for i in range(1, total)
            if not self.method.fresh(i, total) and not self.method.whole(i - 1, total)
        ]  # fmt: skip
        if len(stale) < self.moments:
            raise BadConfig(
                f"only {len(stale)} of {total} steps use values of a step that did, and calibrate looks at "
                f"{self.moments}: give more steps, or fewer of parallel.warmup_steps"
            )
        return {stale[int((k + 0.5) * len(stale) / self.moments)] for k in range(self.moments)}

    def _looked(self, split: Split, forward: Callable[[], Any]) -> Any:
        """The true output; on the way, that of a call for each layer."""
        before = [(exchange, exchange.held()) for exchange in split.exchanges]
        output = forward()
        truth, after = _first(output), [(exchange, exchange.held()) for exchange in split.exchanges]
        for layer in split.exchanges:
            if layer.slot(split.step).alike is None:
                continue  # it asks nobody: attention to the text
            _hold(before)
            layer.waits = False
            found = _first(forward())
            layer.waits = True
            self.errors[layer.layer].append(_relative(found, truth))
            self.sizes[layer.layer] += layer.slot(split.step).size
        _hold(after)
        return output


def _hold(held: list[tuple[Exchange, Any]]) -> None:
    for exchange, slots in held:
        exchange.hold(slots)


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _relative(value: Tensor, truth: Tensor) -> float:
    value, truth = wide(value), wide(truth)
    return float((value - truth).square().sum() / truth.square().sum().clamp_min(1e-300))
