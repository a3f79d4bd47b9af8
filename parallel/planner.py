"""What each method would bring on so many devices and such a link: a cost model over what a rank does in a step.

A synchronous step takes its computation and of every transfer what is left when it is waited for; a displaced one the
longer of the two, then the output; ParaStep's ranks whole steps, one message a cycle. What is what is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastdiff.anatomy import Anatomy
from fastdiff.errors import UnsupportedModel

from . import REGISTRY
from .base import ParallelMethod
from .codec import Codec
from .elapsed import elapsed
from .mesh import Topology
from .prediction import Prediction
from .rehearsal import Call, Part, Rehearsed, rehearse
from .sharing import NO_BLOCKS, Blocks


@dataclass(frozen=True)
class Site:
    """What a plan is for. link: bytes a second that a rank can send; latency: seconds; output: bytes of what the
    solver is given at a step; weights: bytes of the whole pipeline; memory: bytes of a device. With `one_step`, the
    seconds of a step on one device, a rank's are its share of the operations and `overhead`; else those measured."""

    devices: int
    link: float
    latency: float
    steps: int
    output: int
    weights: int
    memory: float = math.inf
    one_step: float | None = None
    overhead: float = 0.0
    blocks: Blocks = NO_BLOCKS


@dataclass(frozen=True)
class Plan:
    """A step on one device (seconds; bytes with the weights), and every method that could run, those refused last."""

    one_step: float
    one_memory: int
    rows: list[Prediction]

    @property
    def best(self) -> Prediction | None:
        return self.rows[0] if self.rows and self.rows[0].refused is None else None


@dataclass(frozen=True)
class Trial:
    """One method on one mesh with what its busiest ranks would do, or the reason why the model cannot be split."""

    method: ParallelMethod
    mesh: Topology
    played: Sequence[Rehearsed] = ()
    reason: str | None = None


def alone(anatomy: Anatomy, calls: Sequence[Call]) -> Rehearsed:
    """A step on one device. `calls` are the arguments of the denoiser's in a step."""
    return rehearse(anatomy, calls, None, Topology(1, 1, 1, 0))


def trials(anatomy: Anatomy, calls: Sequence[Call], devices: int, one: Rehearsed, codec: Codec = "raw") -> list[Trial]:
    """Rehearsals of every method."""
    return [attempt(anatomy, calls, method, devices, one) for method in candidates(devices, halves(calls), codec)]


def plan(one: Rehearsed, tried: Sequence[Trial], site: Site) -> Plan:
    """Predict every method; where weights are too big, with shares of them, too."""
    found = [_predict(trial, one, site) for trial in tried]
    for row, trial in zip(list(found), tried, strict=True):
        if row.predicted_memory > site.memory and site.blocks.helps(trial.method):
            shared = site.blocks.shared_out(row, trial.mesh, site.link, site.steps)
            found.append(replace(shared, refused=_refusal(shared, site)))
    found.sort(key=lambda p: (p.refused is not None, p.predicted_seconds))
    return Plan(_one_step(site, one), site.weights + one.held, found)


def halves(calls: Sequence[Call]) -> bool:
    """Whether a step has two halves of guidance: two calls, or a batch of two for one picture."""
    return len(calls) == 2 or (len(calls) == 1 and batch(calls) == 2)


def batch(calls: Sequence[Call]) -> int:
    args, kwargs = calls[0]
    return len(next(leaf for leaf in (*args, *kwargs.values()) if getattr(leaf, "ndim", 0) > 1))


def candidates(devices: int, guided: bool, codec: Codec = "raw") -> Iterator[ParallelMethod]:
    """Guidance is shared out first where devices remain for a method: it costs no bytes but the output's."""
    for name in REGISTRY:
        cfg = 2 if guided and devices % 2 == 0 and (devices > 2 or name == "cfg") else 1
        if name != "cfg" or (devices == 2 and guided):  # on more devices cfg is patch with cfg = 2
            yield REGISTRY[name](method=name, devices=devices, cfg=cfg, codec=codec)


def attempt(anatomy: Anatomy, calls: Sequence[Call], method: ParallelMethod, devices: int, one: Rehearsed) -> Trial:
    """One method, played by its busiest ranks."""
    mesh = method.topology(devices, 0)
    if mesh.cfg * mesh.patch == 1:
        return Trial(method, mesh, [one])
    try:  # a rank with two neighbours sends most, but where the shares differ the first computes most
        played = [rehearse(anatomy, calls, method, replace(mesh, rank=int(mesh.patch > 2)))]
        if played[0].behind:
            played.append(rehearse(anatomy, calls, method, mesh))
        return Trial(method, mesh, played)
    except UnsupportedModel as error:
        return Trial(method, mesh, reason=str(error))


def _predict(trial: Trial, one: Rehearsed, site: Site) -> Prediction:
    method = trial.method
    settings = method.model_dump(include={"method", "devices", "cfg", "codec"})
    settings |= method.model_dump(include={"halves", "groups"}, exclude_defaults=True)
    if trial.reason is not None:
        return Prediction(method.method, settings, refused=trial.reason)
    best = max((_cost(method, trial.mesh, part, one, site) for part in trial.played), key=lambda p: p.predicted_seconds)
    memory = site.weights + max(part.held - part.spared for part in trial.played)
    best = replace(best, settings=settings, predicted_memory=memory)
    return replace(best, refused=_refusal(best, site))


def _refusal(found: Prediction, site: Site) -> str | None:
    if found.predicted_memory > site.memory:
        need, have = found.predicted_memory / 2**30, site.memory / 2**30
        return f"too big: predicted to need {need:.2f} GiB on each device, which has {have:.2f}"
    alone_fits = site.weights <= site.memory and "shard" not in found.settings
    if found.predicted_speedup <= 1 and alone_fits:
        return f"predicted slower than one device ({found.predicted_speedup:.2f} times its speed)"
    return None


def _cost(method: ParallelMethod, mesh: Topology, rank: Rehearsed, one: Rehearsed, site: Site) -> Prediction:
    def computing(part: Part, fresh: bool = True) -> float:
        share = part.flops / max(1, one.stale.flops)
        own = (site.one_step or 0) * share + site.overhead * (mesh.patch * mesh.cfg > 1)
        return (part.seconds if site.one_step is None else own) * method.stretch(mesh.patch, fresh)

    def synchronous(part: Part) -> float:
        parts = 1 + getattr(method, "halves", False)
        return elapsed(part.events, part.flops, computing(part), site.link, site.latency, parts)

    def displaced(part: Part) -> float:
        output = part.exchanges["output"] * site.latency + part.bytes_of(True) / site.link
        return max(computing(part, fresh=False), part.bytes_of(False) / site.link) + output

    fresh = sum(method.fresh(index, site.steps) for index in range(site.steps))
    total = fresh * synchronous(rank.fresh) + (site.steps - fresh) * displaced(rank.stale)
    counted = rank.stale.sent
    if mesh.step > 1:
        warmup = min(method.warmup_steps, site.steps)
        cycles = math.ceil((site.steps - warmup) / mesh.step)
        eps = (mesh.step - 1) * site.output
        total = (warmup + cycles) * synchronous(rank.fresh) + cycles * (site.latency + eps / site.link)
        counted = counted + type(counted)(step=math.ceil(eps * cycles / site.steps))
    waits = method.fresh(method.warmup_steps + 1) and mesh.step == 1
    exact = waits and method.context is None and method.codec == "raw"
    return Prediction(
        method.method, {}, (mesh.cfg, mesh.step, mesh.patch), exact, computing(rank.stale),
        rank.fresh.sent.total(), counted.total(), dict(counted), total / site.steps, total,
        _one_step(site, one) * site.steps / total,
    )  # fmt: skip


def _one_step(site: Site, one: Rehearsed) -> float:
    return one.stale.seconds if site.one_step is None else site.one_step
