"""The matrix: every registered cache method, with settings that skip nothing and settings that skip a lot; and every
quantization scheme, which has no such two, so that only some of the laws are about it.

A new method fails `test_every_method_has_a_row` until it has a row here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

import fastdiff
from fastdiff.anatomy import fingerprint
from fastdiff.caching.calibration import Drawing
from fastdiff.caching.methods.cachequant import Corrected
from fastdiff.caching.methods.magcache import Ratios
from fastdiff.caching.plan import Plan, Schedule
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.ranges import calibrate_ranges
from fastdiff.quant.build import layers_of
from fastdiff.quant.schemes.mixed import BitPlan
from fastdiff.quant.schemes.w8a8 import W8A8
from tests import tiny
from tests.tiny import FAMILIES, TRANSFORMERS, UNETS

STEPS = 6
CROSS = ("sd15", "sdxl", "pixart", "wan")  # families with cross-attention layers
# One UNet, one transformer whose guidance is a batch, one whose guidance is two calls: where a law tests machinery that
# knows no method and no family, and costs many runs, these stand for the others.
KINDS = ("sd15", "sd3", "wan")

Leaf = Callable[[DiffusionPipeline], nn.Module]


def last_attention(pipe: DiffusionPipeline) -> nn.Module:
    """A projection in the last attention layer: for methods that leave out layers, not whole blocks."""
    return [m for path, m in tiny.denoiser(pipe).named_modules() if path.endswith(".to_q")][-1]


def last_cross_attention(pipe: DiffusionPipeline) -> nn.Module:
    return [m for path, m in tiny.denoiser(pipe).named_modules() if path.endswith("attn2.to_q")][-1]


def encoder_leaf(pipe: DiffusionPipeline) -> nn.Module:
    """A layer of what Faster Diffusion leaves out: a UNet's middle, or a transformer's first block."""
    if hasattr(pipe, "unet"):
        return tiny.deepest_leaf(pipe)
    first = next(child for child in pipe.transformer.children() if isinstance(child, nn.ModuleList))
    return next(m for m in first[0].modules() if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class Row:
    """neutral and aggressive settings of a method, the steps of STEPS that the aggressive ones compute, and where it
    works; `refusal` is part of what it says elsewhere.

    leaf: a layer that runs exactly when a step is computed. partly: steps in which one of two calls is computed.
    saves: what a cached step saves of the rows (images, both halves of guidance) that run through the leaf: all, or
    with guidance dropped one of two.
    """

    neutral: dict[str, Any]
    aggressive: dict[str, Any]
    computed: int
    families: tuple[str, ...] = FAMILIES
    refusal: str = ""
    leaf: Leaf = tiny.deepest_leaf
    partly: int = 0
    saves: int = 2

    @property
    def method(self) -> str:
        return self.aggressive["method"]

    @property
    def cached(self) -> int:
        return STEPS - self.computed

    @property
    def rows(self) -> int:
        """Rows that run through the leaf in the standard call: two a step, but for what is saved."""
        return 2 * STEPS - self.saves * (self.cached + self.partly)


def _row(
    method: str, neutral: dict[str, Any], aggressive: dict[str, Any], computed: int, *where: Any, **more: Any
) -> Row:
    return Row({"method": method, **neutral}, {"method": method, **aggressive}, computed, *where, **more)


@dataclass(frozen=True)
class PlannedRow:
    """A row on one family: its plan, made when a test asks for it, names the denoiser and the noise levels."""

    method: str
    name: str
    kind: type[Plan]
    nothing: Callable[[], dict[str, dict[str, Any]]]  # settings, and fields of the plan, with which nothing is skipped
    much: Callable[[], dict[str, dict[str, Any]]]
    computed: int
    refusal = ""
    leaf = staticmethod(tiny.deepest_leaf)
    partly, saves = 0, 2
    cached, rows = Row.cached, Row.rows

    @property
    def families(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def neutral(self) -> dict[str, Any]:
        return self._settings("neutral", self.nothing())

    @property
    def aggressive(self) -> dict[str, Any]:
        return self._settings("aggressive", self.much())

    def _settings(self, which: str, told: dict[str, dict[str, Any]]) -> dict[str, Any]:
        path = Path(_plan_folder().name) / f"{self.method}-{self.name}-{which}.json"
        if not path.exists():
            path.write_text(self.kind(**origin(self.name), **told["plan"]).model_dump_json())
        return {"method": self.method, "plan": str(path), **told["settings"]}


@dataclass(frozen=True)
class SwitchRow(PlannedRow):
    """A row on one family; its second denoiser, written when a test asks for it, has weights a little smaller."""

    def _settings(self, which: str, told: dict[str, dict[str, Any]]) -> dict[str, Any]:
        folder = Path(_plan_folder().name) / f"second-{self.name}"
        if not folder.exists():
            second: Any = tiny.denoiser(tiny.make(self.name))
            with torch.no_grad():
                for weight in second.parameters():
                    weight *= 0.99
            second.save_pretrained(folder)
        return {"method": self.method, "second": str(folder), **told["settings"]}


@cache
def _plan_folder() -> TemporaryDirectory:
    return TemporaryDirectory()  # removed with the cache, at exit


@cache
def origin(name: str) -> dict[str, Any]:
    """What a plan says of the standard call of a family."""
    pipe = tiny.make(name)
    with fastdiff.accelerate(pipe) as handle:
        runs: list[Any] = []
        handle.clock.on_start.append(runs.append)
        tiny.run(pipe, name, steps=STEPS)
    return Drawing(anatomies(pipe)[0]).origin(runs[0])


def _schedule(*steps: int) -> Callable[[], dict[str, dict[str, Any]]]:
    return lambda: {"settings": {}, "plan": {"compute": steps}}


def _between(start: float, stop: float) -> Callable[[], dict[str, dict[str, Any]]]:
    return lambda: {"settings": {"between": [start, stop]}}


def _magnitudes(**settings: Any) -> Callable[[], dict[str, dict[str, Any]]]:
    return lambda: {"settings": settings, "plan": {"ratios": [1.0, *(0.9 for _ in range(STEPS - 1))]}}


_ALL, _TWO = {"compute_steps": list(range(STEPS))}, {"compute_steps": [0, 3]}
_NO_UNET, _NO_STACK, _NO_CROSS = "is no UNet", "no stack of transformer blocks", "has no cross-attention"
_EACH, _THIRD = {"interval": 1}, {"interval": 3, "warmup_steps": 1}
_NEVER, _ALWAYS = {"threshold": 0, "cooldown_steps": 0}, {"threshold": 1e9, "cooldown_steps": 0}
_GATE, _NO_GATE = {"gate": 0.5}, {"gate": 1.0}
_ATTENTION = {"leaf": last_attention}
_SPECTRUM = {"predictor": "spectrum", "order": 4}
_DAMPED = {"predictor": "adams_bashforth", "damping": 0.4}
_LAST = {**_TWO, "site": "stack", "live_blocks": 0, "guard": "speca"}
_FEW = {"max_consecutive_cached": 99}  # more than there are steps; TOML, in which rows are written too, has no None

ROWS: dict[str, Row | PlannedRow] = {
    "static": _row("static", _ALL, _TWO, 2),
    "static inner": _row(
        "static", {**_ALL, "site": "inner"}, {**_TWO, "site": "inner", "branch": 2}, 2, UNETS, _NO_UNET
    ),
    "static stack": _row(
        "static", {**_ALL, "site": "stack"}, {**_TWO, "site": "stack"}, 2, TRANSFORMERS, _NO_STACK
    ),
    # predictors do not know families: those that stand for the others
    "static spectrum": _row(
        "static", {**_ALL, **_SPECTRUM}, {"compute_steps": [0, 1, 2, 4], **_SPECTRUM}, 4, KINDS
    ),
    "static damped": _row("static", {**_ALL, **_DAMPED}, {"compute_steps": [0, 1, 3], **_DAMPED}, 3, KINDS),
    # with a bound of 0 all that the plan skips is computed, with one that nothing reaches nothing of it
    "static verify": _row(
        "static", {**_TWO, "guard": "verify", "verify_bound": 0}, {**_TWO, "guard": "verify", "verify_bound": 1e9}, 2
    ),
    "static speca": _row(
        "static", {**_LAST, "verify_bound": 0}, {**_LAST, "verify_bound": 1e9}, 2, TRANSFORMERS, _NO_STACK,
        leaf=encoder_leaf,  # the last block runs in cached steps, too
    ),
    "deepcache": _row("deepcache", _EACH, {"interval": 3}, 2, UNETS, _NO_UNET),
    "first_block": _row("first_block", {"threshold": 0}, {"threshold": 1e9}, 1, TRANSFORMERS, _NO_STACK),
    "dbcache": _row(
        "dbcache", {"threshold": 0, "live_blocks": 1}, {"threshold": 1e9, "live_blocks": 1, "warmup_steps": 1}, 1,
        TRANSFORMERS, _NO_STACK,
    ),
    "dicache": _row("dicache", _NEVER, {**_ALWAYS, "warmup_steps": 1}, 1, TRANSFORMERS, _NO_STACK),
    "dicache slope": _row(
        "dicache", {**_NEVER, "slope_max": 4}, {**_ALWAYS, "warmup_steps": 2, "slope_max": 4}, 2,
        TRANSFORMERS, _NO_STACK,
    ),
    "ab_cache": _row("ab_cache", _EACH, _THIRD, 2),
    "ab_cache blocks": _row("ab_cache", {**_EACH, "site": "blocks"}, {**_THIRD, "site": "blocks"}, 2),
    "ab_cache stack": _row(
        "ab_cache", {**_EACH, "site": "stack"}, {**_THIRD, "site": "stack"}, 2, TRANSFORMERS, _NO_STACK
    ),
    "teacache": _row("teacache", _NEVER, _ALWAYS, 1, TRANSFORMERS, _NO_STACK),
    "easycache": _row("easycache", _NEVER, {**_ALWAYS, "warmup_steps": 1}, 1),
    "seacache": _row("seacache", _NEVER, {**_ALWAYS, **_FEW}, 1),
    "taylorseer": _row("taylorseer", _EACH, _THIRD, 2, **_ATTENTION),
    "taylorseer lite": _row("taylorseer", {**_EACH, "lite": True}, {**_THIRD, "lite": True}, 2),
    "fora": _row("fora", _EACH, {"interval": 3}, 2, **_ATTENTION),
    "pab": _row(
        "pab",
        {"self_interval": 1, "temporal_interval": 1, "cross_interval": 1, "between": [0, 1]},
        {"self_interval": 3, "temporal_interval": 3, "cross_interval": 3, "between": [0, 1]}, 2, **_ATTENTION,
    ),
    # frozen cross-attention alone: self-attention and both halves of guidance always run
    "tgate keep": _row(
        "tgate", {**_NO_GATE, "guidance": "keep"}, {**_GATE, "guidance": "keep"}, 3, CROSS, _NO_CROSS,
        leaf=last_cross_attention,
    ),
    # the conditional half always runs, but for its cross-attention, which no deepest leaf is a part of
    "tgate": _row("tgate", _NO_GATE, _GATE, 3, tuple(name for name in FAMILIES if name != "flux"), saves=1),
    # guidance is two calls and nothing of the conditional one is frozen: no step is cached, three are partly
    "tgate flux": _row("tgate", _NO_GATE, _GATE, STEPS, ("flux",), partly=3, saves=1),
    "joint": _row("joint", {"kinds": ["full"] * STEPS}, {"kinds": ["full", "partial", "partial"] * (STEPS // 3)}, 2),
    # what follows the full steps is asked for the conditional half alone, and guidance goes on; where it is two calls,
    # of which one is left out, no step is cached and each is partly (flux, wan)
    "joint conditional": _row(
        "joint", {"kinds": ["full"] * STEPS}, {"kinds": ["full"] * 3 + ["conditional"] * (STEPS - 3)}, 3,
        tuple(name for name in FAMILIES if name not in ("flux", "wan")), saves=1,
    ),
    "faster_diffusion": _row(
        "faster_diffusion", _EACH, {"interval": 3, "max_parallel": 3}, 2, leaf=encoder_leaf
    ),
    "faster_diffusion serial": _row(
        "faster_diffusion", {**_EACH, "max_parallel": 1}, {"interval": 3, "max_parallel": 1}, 2, leaf=encoder_leaf
    ),
    "a_sdm": _row("a_sdm", _EACH, {"interval": 3, "sites": ["*"]}, 2),
    "a_sdm unit": _row(
        "a_sdm", {**_EACH, "level": "unit"}, {"interval": 3, "level": "unit", "sites": ["*"]}, 2, **_ATTENTION
    ),
    **{
        f"switch {name}": SwitchRow("switch", name, Plan, _between(0, 0), _between(0.5, 1), 3) for name in FAMILIES
    },
    **{
        f"{method} {name}": PlannedRow(method, name, kind, nothing, much, computed)
        for method, kind, nothing, much, computed in (
            ("dp", Schedule, _schedule(*range(STEPS)), _schedule(0, 2, 4), 3),
            ("cachequant", Corrected, _schedule(*range(STEPS)), _schedule(0, 3), 2),
            ("magcache", Ratios, _magnitudes(threshold=0), _magnitudes(threshold=1e9, retention=0, **_FEW), 1),
        )
        for name in FAMILIES
    },
}  # fmt: skip

# Quantization schemes work on every family; what they are given of it (ranges, a plan) is made when a test asks.
SCHEMES: dict[str, Callable[[str], dict[str, Any]]] = {
    "w8a16": lambda name: {"method": "w8a16"},
    "w8a8": lambda name: {"method": "w8a8"},
    "w8a8 static": lambda name: {"method": "w8a8", "timestep_buckets": 3, "ranges": ranges(name)},
    "w4a16": lambda name: {"method": "w4a16", "low_rank": 2},
    "w4a8": lambda name: {"method": "w4a8", "rounding": "nearest"},
    "fp8": lambda name: {"method": "fp8"},
    "mixed": lambda name: {"method": "mixed", "plan": bits(name)},
}
QUANTIZED = [(f"{scheme} {name}", name) for scheme in SCHEMES for name in FAMILIES]
QUANTIZED_ONCE = [(row, name) for row, name in QUANTIZED if name == "sd3"]
QUANTIZED_KINDS = [(row, name) for row, name in QUANTIZED if name in KINDS]


@cache
def ranges(name: str) -> str:
    path = Path(_plan_folder().name) / f"{name}.safetensors"
    told = tiny.arguments(name, STEPS) | {"negative_prompt": ["bad"]}
    del told["generator"], told["output_type"]
    calibrate_ranges(tiny.make(name), W8A8(timestep_buckets=3), [told.pop("prompt")], **told).save(path)
    return str(path)


@cache
def bits(name: str) -> BitPlan:
    """4, 8 and 16 bits in turn."""
    anatomy = anatomies(tiny.make(name))[0]
    layers = {found.name: (4, 8, 16)[k % 3] for k, found in enumerate(layers_of(anatomy.denoiser))}
    return BitPlan(denoiser=fingerprint(anatomy), bits=layers, bytes=0, predicted=0.1, measured=0.1)


def levers(row: str) -> dict[str, Any]:
    """Of a row with the aggressive settings, or of a scheme on a family."""
    if row in ROWS:
        return {"cache": ROWS[row].aggressive}
    scheme, _, name = row.rpartition(" ")
    return {"quant": SCHEMES[scheme](name)}


SUPPORTED = [(row, name) for row in ROWS for name in ROWS[row].families]
REFUSED = [(row, name) for row in ROWS for name in FAMILIES if ROWS[row].refusal and name not in ROWS[row].families]
ONE_A_KIND = [(row, name) for row, name in SUPPORTED if name in KINDS or ROWS[row].families == ("flux",)]
# Every method once, on the cheapest family that it works on: for laws of which neither method nor family has a part,
# and that cost many runs.
_CHEAPEST_FIRST = sorted(ONE_A_KIND, key=lambda pair: ("sd3", "wan", "flux", "sd15").index(pair[1]))
ONCE = list({row.removesuffix(f" {name}"): (row, name) for row, name in reversed(_CHEAPEST_FIRST)}.values())
ONE_ROW_A_FAMILY = list({name: (row, name) for row, name in SUPPORTED}.values())

# Two families are built like another one: a larger sd15, and a video transformer beside wan.
UNLIKE = [(row, name) for row, name in SUPPORTED if name not in ("sdxl", "cogvideox")]


def each(pairs: Iterable[tuple[str, str]], quick: Container[tuple[str, str]] | None = None) -> pytest.MarkDecorator:
    """Parametrize a test over (row, family) pairs, with readable ids; all but the quick pairs are slow.

    Unless told, those of `KINDS` are quick, and whatever no family of these has.
    """
    pairs = list(pairs)
    of_kinds = {_method(*pair) for pair in pairs if pair[1] in KINDS}

    def case(row: str, name: str) -> Any:
        now = (row, name) in quick if quick is not None else name in KINDS or _method(row, name) not in of_kinds
        told = row if row.endswith(f" {name}") else f"{row}-{name}"
        return pytest.param(row, name, id=told, marks=() if now else pytest.mark.slow)

    return pytest.mark.parametrize(("row", "name"), [case(*pair) for pair in pairs])


def _method(row: str, name: str) -> str:
    """The row without the family that a plan or a scheme is made for."""
    return row if isinstance(ROWS.get(row), Row) else row.removesuffix(f" {name}")


def plain(name: str, steps: int = STEPS) -> Tensor:
    """What plain diffusers makes of the standard call."""
    return _ran(name, steps)[0]


def used(name: str) -> DiffusionPipeline:
    """A pipeline as after the standard call: with what that leaves in scheduler, pipeline and denoiser."""
    ran = _ran(name, STEPS)[1]
    pipe = tiny.make(name)
    pipe.scheduler = copy.deepcopy(ran.scheduler)
    vars(pipe).update({key: value for key, value in vars(ran).items() if key not in vars(pipe)})
    if hasattr(tiny.denoiser(ran), "_diffusers_hook"):
        HookRegistry.check_if_exists_or_initialize(tiny.denoiser(pipe))
    return pipe


@cache
def _ran(name: str, steps: int) -> tuple[Tensor, DiffusionPipeline]:
    pipe = tiny.make(name)
    return tiny.run(pipe, name, steps=steps), pipe


@cache
def cached_afresh(row: str, name: str) -> Tensor:
    """What the aggressive settings make of the standard call in a fresh pipeline."""
    return fresh(row, name)


def fresh(row: str, name: str, scheduler: Any = None, **overrides: Any) -> Tensor:
    """One accelerated call of a pipeline that has never run."""
    pipe = tiny.make(name)
    if scheduler is not None:
        pipe.scheduler = scheduler
    accelerate(pipe, row)
    return tiny.run(pipe, name, **({"steps": STEPS} | overrides))


def accelerate(pipe: DiffusionPipeline, row: str) -> fastdiff.Accelerated:
    """With the aggressive settings, or a scheme."""
    return fastdiff.accelerate(pipe, **levers(row))


def neutral(pipe: DiffusionPipeline, row: str) -> fastdiff.Accelerated:
    return fastdiff.accelerate(pipe, cache=ROWS[row].neutral if row in ROWS else None)
