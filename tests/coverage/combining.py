"""One combination of levers on a tiny pipeline: works, refused with the reason, or not applicable; and the laws that a
working one holds. Values come from the registries, so that a new method is tried with everything by itself.

Random weights: what is judged is bits, counts and reasons, never quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations
from typing import Any, get_args

import torch
from torch import Tensor

import fastdiff
from fastdiff.anatomy import fingerprint
from fastdiff.config import METHOD_KINDS, OFF, Compile
from fastdiff.errors import FastdiffError
from fastdiff.parallel.base import ParallelMethod
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.solving.plan import SolverPlan
from fastdiff.registry import names, registry
from tests import tiny
from tests.laws.rows import ROWS, SCHEMES, STEPS, used
from tests.near import FLOOR, apart, rounding
from tests.state import differences, snapshot

PIPELINES = {"pixart": "DiT", "sd15": "UNet", "wan": "video"}
# Backends of diffusers' dispatcher that run everywhere; each of the others is tried by one real call when it is asked
# for, whatever else is on.
ATTENTION = ("native", "_native_math")
# Sparse attention, with blocks that leave something out of so few tokens.
SPARSE: dict[str, dict[str, Any]] = {
    "sparge": {"keep": 0.3, "interval": 2, "block": 4, "min_tokens": 1},
    "radial": {"decay": 0.1, "block": 2, "min_tokens": 1},
}
# Of videos the first frames that are no neighbours.
CALLS: dict[str, dict[str, Any]] = {"wan": {"num_frames": 9}}
WORKS = "works"
LATE = 1  # steps at the start in which no parallel method uses anything old
RAN = ("scheduler.", "pipe._num_timesteps")  # what runs of two and more ranks, and of graphs, leave as plain ones do


@dataclass(frozen=True)
class Combination:
    """A value of each factor; neutral: with the cache's settings that skip nothing."""

    pipeline: str
    cache: str = OFF
    parallel: str = OFF
    quant: str = OFF
    solver: str = OFF
    attention: str = OFF
    compile: str = OFF
    neutral: bool = False

    @property
    def levers(self) -> dict[str, str]:
        """The values of those that are on."""
        return {kind: value for kind in LEVERS if (value := getattr(self, kind)) != OFF}

    @property
    def label(self) -> str:
        return " ".join([self.pipeline, *(f"{kind}={value}" for kind, value in self.levers.items())])

    def without(self, *kinds: str) -> Combination:
        """The same with these levers off."""
        rest = replace(self, **dict.fromkeys(kinds, OFF))
        return replace(rest, neutral=False) if rest.cache == OFF else rest


LEVERS = tuple(field.name for field in fields(Combination))[1:-1]


def factors() -> dict[str, tuple[str, ...]]:
    """Each lever's values, without `off`."""
    known = names()
    scopes = get_args(Compile.model_fields["scope"].annotation)
    found = {kind: tuple(known[kind]) for kind in METHOD_KINDS}
    found |= {"attention": (*ATTENTION, *SPARSE), "compile": scopes}
    return {kind: found[kind] for kind in LEVERS}


def not_applicable(kind: str, value: str) -> str | None:
    """Why a value is for no pipeline here."""
    if kind == "cache" and registry("cache")[value].language:  # type: ignore[attr-defined]
        return "it is for language models, whose steps have no noise levels"
    return None


def singles(name: str) -> Iterator[Combination]:
    """Each value of each lever alone."""
    for kind, values in factors().items():
        for value in values:
            if not_applicable(kind, value) is None:
                yield Combination(name, **{kind: value})


def home(levers: Mapping[str, str], alone: Mapping[str, str]) -> str | None:
    """The first pipeline on which all of these values work alone, as `alone` says by label; None if there is none."""
    labels = {name: [Combination(name, **{kind: value}).label for kind, value in levers.items()] for name in PIPELINES}
    return next((name for name, own in labels.items() if all(alone.get(label) == WORKS for label in own)), None)


def pairs(name: str, alone: Mapping[str, str]) -> Iterator[Combination]:
    """Each two values of different levers of which this is the home."""
    for one, other in combinations(singles(name), 2):
        both = one.levers | other.levers
        if len(both) == 2 and home(both, alone) == name:
            yield Combination(name, **both)


def exact(method: str) -> bool:
    """Whether a parallel method gives what one device gives: all of this very step, and every step's own latents."""
    cls: Any = registry("parallel")[method]
    return cls.own_axis != "step" and cls.fresh is ParallelMethod.fresh and cls.context is ParallelMethod.context


# settings


def row_of(method: str, name: str) -> Any:
    """The settings of a cache method from the matrix of the laws, or of another family where it is refused on this."""
    rows = [f"{method} {name}", method, *(row for row in ROWS if ROWS[row].method == method)]
    own = [row for row in rows if row in ROWS and ROWS[row].method == method]
    return ROWS[next((row for row in own if name in ROWS[row].families), own[0])]


def settings(asked: Combination) -> dict[str, Any]:
    """Keywords of `accelerate`."""
    made: dict[str, Callable[[str], Any]] = {
        "cache": lambda method: _cached(row_of(method, asked.pipeline), asked.neutral),
        "parallel": _shared,
        "quant": lambda scheme: SCHEMES[scheme](asked.pipeline) | {"speed": "smallest"},
        "solver": lambda method: {"method": method, "plan": _plan(asked.pipeline)},
        "attention": lambda way: {"sparse": way, **SPARSE[way]} if way in SPARSE else {"backend": way},
        "compile": lambda scope: {"enabled": True, "scope": scope, "backend": "eager"},
    }
    return {kind: made[kind](value) for kind, value in asked.levers.items()}


def _cached(row: Any, neutral: bool) -> dict[str, Any]:
    return row.neutral if neutral else row.aggressive


def _shared(method: str) -> dict[str, Any]:
    """The shortest warm-up, so that something old is used in so few steps."""
    more = {} if exact(method) else {"warmup_steps": LATE}
    return {"method": method, "timeout": 20.0, **more, **({"patches": 2} if method == "pipefusion" else {})}


@cache
def _plan(name: str) -> SolverPlan:
    """As many evaluations as steps, at other noise levels than the scheduler's."""
    places = tuple((k / STEPS) ** 1.3 for k in range(STEPS + 1))
    found = fingerprint(anatomies(tiny.make(name))[0])
    return SolverPlan(denoiser=found, places=places, order=2, weights=((),) * STEPS, evaluations=STEPS, scheduler="any")


# the laws


def drawn(pipe: Any, name: str, **more: Any) -> Tensor:
    """Latents of the standard call."""
    return tiny.run(pipe, name, steps=STEPS, **CALLS.get(name, {}), **more)


@cache
def plain(name: str) -> Tensor:
    """What plain diffusers makes of it."""
    return drawn(tiny.make(name), name)


class Broken(Exception):
    """Raised on purpose, in the middle of a run."""


class Trials:
    """Tries combinations, and remembers latents of those that others are compared with.

    settings: keywords of `accelerate` for a combination; on several ranks they have to be the same on all.
    """

    def __init__(self, settings: Callable[[Combination], dict[str, Any]] = settings) -> None:
        self.settings = cache(settings)
        self.latents = cache(self._latents)
        self.computed: dict[Combination, int] = {}  # steps of those
        self.rounded = cache(_rounded)

    def tried(self, asked: Combination, again: bool = True, breaks: bool = True) -> str:
        """`works` or `refused: <sentence>`. Raises AssertionError where a law does not hold, and whatever else than a
        FastdiffError comes out of it.

        again: with a second call, and one in which the cache skips nothing; breaks: with one that is broken off, and
        one after it.
        """
        pipe = used(asked.pipeline)
        if asked.compile != OFF:
            _generations()
        before = snapshot(pipe)
        try:
            with fastdiff.accelerate(pipe, **self.settings(asked)) as handle:
                first = drawn(pipe, asked.pipeline)
                self._reported(asked, handle, first)
                if again:
                    second = drawn(pipe, asked.pipeline)
                    assert torch.equal(second, first), "a second call differs from the first"
                if breaks:
                    self._broken(asked, pipe, first)
        except FastdiffError as error:
            assert "\n" not in str(error).strip(), f"more than a sentence: {error}"
            self._restored(asked, pipe, before)
            return f"refused: {error}"
        self._restored(asked, pipe, before)
        self._compared(asked, first, again)
        return WORKS

    def _reported(self, asked: Combination, handle: Any, found: Tensor) -> None:
        """What was asked for was done, and the report says so."""
        report = handle.report
        assert bool(torch.isfinite(found).all()), "not finite"
        assert report.steps == STEPS, f"{report.steps} steps"
        if asked.cache != OFF:
            assert report.cached + report.partly > 0, f"the cache left nothing out: {report}"
        if asked.attention in SPARSE:
            (told,) = report.attention.values()
            assert told["sparse"] > 0 and told["density"] < 1, f"no blocks were left out: {told}"
        if asked.parallel != OFF:
            assert len(report.ranks) == 2 and report.bytes_sent > 0, f"nothing was sent: {report}"
        assert not [note for note in report.notes if "different latents" in note], report.notes
        if asked.quant != OFF:
            assert handle.quantized is not None and handle.quantized.report.layers, "nothing was quantized"

    def _broken(self, asked: Combination, pipe: Any, first: Tensor) -> None:
        """A call after one that was left by an exception, on all ranks at once, is as the first."""

        def fail(_pipe: Any, step: int) -> None:
            if step == 1:
                raise Broken

        try:
            drawn(pipe, asked.pipeline, seed=7, **tiny.at_each_step(asked.pipeline, fail))
        except Broken:
            pass
        else:
            raise AssertionError("an exception in a callback was swallowed")
        again = drawn(pipe, asked.pipeline)
        assert torch.equal(again, first), "a call after an exception differs from the first"

    def _restored(self, asked: Combination, pipe: Any, before: dict[str, Any]) -> None:
        assert torch.equal(drawn(pipe, asked.pipeline), plain(asked.pipeline)), "restored, but not plain"
        ran = RAN if asked.compile != OFF or asked.parallel != OFF else ()
        left = [text for text in differences(before, snapshot(pipe)) if not text.startswith(ran)]
        assert left == [], f"left behind: {left}"

    def _compared(self, asked: Combination, found: Tensor, again: bool) -> None:
        """With what the same gives without one lever: neutral settings and exact methods change nothing, others do."""
        kept = ["compile", *(["parallel"] if asked.parallel != OFF and exact(asked.parallel) else [])]
        kept += ["attention"] if asked.attention not in SPARSE else []
        if asked.levers.keys() & set(kept):
            far, bound = apart(found, self.latents(asked.without(*kept))), self._bound(asked, asked.without(*kept))
            assert far <= bound, f"{far:.1e} from the same on one device and as it is, where rounding makes {bound:.1e}"
        if asked.compile != OFF or not again:
            return  # of graphs, which are as without, the rest is known
        for kind in asked.levers.keys() - set(kept):
            same = torch.equal(found, self.latents(asked.without(kind)))
            # a method that is late only after its warm-up is never late where the cache leaves out all that follows
            nothing_late = kind == "parallel" and self.computed.get(asked.without("parallel"), STEPS) <= LATE
            assert not same or nothing_late, f"{kind} changes nothing"
        if asked.cache != OFF:
            nothing = self.latents(replace(asked, neutral=True))
            assert torch.equal(nothing, self.latents(asked.without("cache"))), "a cache that skips nothing changes bits"

    def _bound(self, asked: Combination, alone: Combination) -> float:
        """What rounding makes of it; of quantized inputs, which it moves to the next level here and there, no more than
        quantization itself does. Ranks that have rows each find ranges of their own for them: both pictures are as far
        as quantization takes them from the same float one, each its own way."""
        own = self.rounded(asked.pipeline)
        if asked.quant == OFF:
            return own
        ways = 1 if asked.parallel in (alone.parallel, "cfg") else 2
        return max(own, ways * apart(self.latents(alone), self.latents(alone.without("quant"))))

    def _latents(self, asked: Combination) -> Tensor:
        if not asked.levers:
            return plain(asked.pipeline)
        pipe = tiny.make(asked.pipeline)
        with fastdiff.accelerate(pipe, **self.settings(asked)) as handle:
            found = drawn(pipe, asked.pipeline)
            self.computed[asked] = handle.report.computed
        return found


def _rounded(name: str) -> float:
    """What another batch size does to a plain picture."""
    texts = {"prompt": ["a red cat"] * 2, "negative_prompt": ["bad"] * 2}
    alone = drawn(tiny.make(name), name)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    both = drawn(tiny.make(name), name, **texts, generator=generator)
    return max(rounding(both[:1], alone), FLOOR)


def _generations() -> None:
    """What dynamo changes of nn.Module, once and for all."""
    from torch._dynamo.mutation_guard import install_generation_tagging_init

    torch._dynamo.reset()
    install_generation_tagging_init()
