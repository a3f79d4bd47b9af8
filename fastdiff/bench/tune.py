"""Finds settings for a goal: the fastest that keep a quality, or the best of a speed. What may do is predicted first,
and what is said was measured, on prompts that nothing was fitted on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastdiff import output
from fastdiff.config import Config
from fastdiff.errors import BadConfig, FastdiffError
from fastdiff.pipelines.calibrate import calibrate
from fastdiff.pipelines.solving.calibrate import fitting
from fastdiff.pipelines.solving.schedulers import solver

from .measure import Observer, draw, run
from .metrics import psnr
from .plan import Contender, Settings
from .prompts import Prompts

EVALUATIONS = (8, 5, 14, 6, 10, 20, 7, 12, 4, 17, 25, 30)  # the first of them are spread, as time may be short
SHARES = (0.6, 0.45, 0.33)  # of the steps that a dynamic program of cached steps computes
SITES = {"": "output", " inside": "auto"}  # what is left out of the other steps
_RIDGE = 0.01  # how strongly weights fitted to a trace are held to the predictor's
# what a choice is tried with besides: neither is predicted, both may be slower than without
_BESIDES: dict[str, dict[str, Any]] = {
    "w8a8": {"quant": {"method": "w8a8"}}, "compiled": {"compile": {"enabled": True}},
    "w8a8 compiled": {"quant": {"method": "w8a8"}, "compile": {"enabled": True}},
}  # fmt: skip
_FINE = 120  # steps of a second-order solver; 58 dB from those of 250 on shapes-unet
_SCREENED = 4  # prompts that all candidates are drawn for
_SCREENING = 3  # timed calls of each of them
_FINALISTS = 4  # candidates that are drawn for all prompts
_ORDER = 4  # of the fitted solvers
_SURE = 1.64  # standard deviations that 19 of 20 values lie above
Say = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """`psnr` decibels to the plain or the converged picture, a `speedup` of the whole call, or `seconds` for it."""

    kind: Literal["psnr", "speedup", "seconds"]
    value: float
    to: Literal["converged", "plain"] = "converged"

    def met(self, tried: Tried) -> bool:
        """A quality is met if as many other prompts keep it 19 times of 20: their mean errs, too."""
        return self.miss(tried, len(tried.decibels)) <= 0

    def miss(self, tried: Tried, prompts: int) -> float:
        """By how much the goal is missed, in its unit, if what is measured were that of so many prompts."""
        if self.kind == "psnr":
            return self.value - tried.mean + tried.spread(prompts) * (2 / prompts) ** 0.5
        return self.value - tried.speedup if self.kind == "speedup" else tried.seconds - self.value

    def best(self, found: Sequence[Tried]) -> Tried | None:
        """Of what meets the goal, the fastest, or that of the best quality; None if nothing does."""
        return max(filter(self.met, found), key=self._worth, default=None)

    def _worth(self, tried: Tried) -> float:
        return tried.speedup if self.kind == "psnr" else tried.mean

    def nearest(self, found: Sequence[Tried], prompts: int = 1) -> list[Tried]:
        """All, the most promising first: those that should meet the goal on so many prompts, the best of them first,
        then what misses least."""
        best = sorted(found, key=self._worth, reverse=True)
        return sorted(best, key=lambda one: max(self.miss(one, prompts), 0))


@dataclass(frozen=True)
class Tried:
    """What was measured of one candidate: seconds of a whole call for one picture, and decibels of each prompt."""

    name: str
    seconds: float
    speedup: float
    decibels: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.decibels))

    def spread(self, prompts: int) -> float:
        """How far below their mean 19 of 20 prompts stay at most, where so many tell it (Abramowitz, Stegun 26.7.5)."""
        student = _SURE + (_SURE**3 + _SURE) / (4 * max(prompts - 1, 1))
        return student * float(np.std(self.decibels, ddof=len(self.decibels) > 1))

    def kept(self, least: float) -> float:
        """The share of prompts at or above some decibels."""
        return float(np.mean(np.asarray(self.decibels) >= least))


class Pictures(Observer):
    """Keeps the pictures of each row."""

    def __init__(self) -> None:
        self.images: dict[str, NDArray] = {}

    def drawn(self, name: str, images: NDArray, decibels: NDArray) -> None:
        self.images[name] = images


@dataclass
class Tuning:
    """A search that can be taken up again: `file` holds what was fitted and measured so far."""

    pipe: Any
    goal: Goal
    settings: Settings
    prompts: Prompts  # to measure on
    texts: Sequence[str]  # to fit on
    file: Path
    minutes: float
    say: Say = print
    configs: dict[str, Config] = field(default_factory=dict)
    screened: list[Tried] = field(default_factory=list)
    _goals: list[NDArray] = field(default_factory=list)

    def search(self) -> tuple[list[Tried], Tried | None]:
        """All that was drawn for every prompt, with fewer steps of the stock solver, and the choice. Raises
        FastdiffError where nothing could be fitted."""
        ends = time.monotonic() + 60 * self.minutes
        self._resume()
        for name, config in self._candidates(ends):
            self.configs[name] = config
            self._keep()
        known = {one.name for one in self.screened}
        if asked := {name: config for name, config in self.configs.items() if name not in known}:
            self.say(f"drawing {len(asked)} candidates for {_SCREENED} prompts")
            self.screened += self._measure(asked, Prompts(self.prompts.texts[:_SCREENED]), _SCREENING)
            self._keep()
        if not (drawn := [one for one in self.screened if one.name in self.configs]):
            raise FastdiffError(
                f"nothing was drawn: no solver of fewer than {self.settings.steps} steps was fitted in "
                f"{self.minutes:g} minutes; give more of either"
            )
        return self._verified([one.name for one in self.goal.nearest(drawn, len(self.prompts))])

    def _verified(self, names: Sequence[str]) -> tuple[list[Tried], Tried | None]:
        """Draws the most promising for every prompt, and others after them as long as none keeps what it promised; then
        the choice with what it can be combined with."""
        found, chosen = dict[str, Tried](), None
        for start in range(0, len(names), _FINALISTS):
            found |= self._drawn(names[start : start + _FINALISTS])
            if chosen := self._best(found):
                break
        if chosen:
            own = self.configs[chosen.name].model_dump(mode="json")
            besides = {f"{chosen.name} {name}": Config(**own | more) for name, more in _BESIDES.items()}
            self.configs |= besides
            found |= self._drawn([chosen.name, *besides])  # all in one run, so that their times can be compared
            chosen = self._best(found)
        return [*found.values()], chosen

    def _drawn(self, names: Sequence[str]) -> dict[str, Tried]:
        self.say(f"drawing {', '.join(names)} for {len(self.prompts)} prompts")
        asked = {name: self.configs[name] for name in names}
        return {one.name: one for one in self._measure(asked, self.prompts, self.settings.rounds)}

    def _best(self, found: Mapping[str, Tried]) -> Tried | None:
        return self.goal.best([one for one in found.values() if one.name in self.configs])

    def _candidates(self, ends: float) -> Iterator[tuple[str, Config]]:
        """Solvers from few evaluations on, then plans of cached steps, until the time is up or there are enough."""
        settings = self.settings
        call: dict[str, Any] = {} if settings.guidance_scale is None else {"guidance_scale": settings.guidance_scale}
        call |= {"num_inference_steps": settings.steps, "seed": settings.seed + 10_000, "batch": settings.batch}
        # first a rough plan of each number, then as many good ones as there is time for
        names = {f"solver {n}": (n, 0, 0) for n in EVALUATIONS} | {f"solver {n} moved": (n, 2, 1) for n in EVALUATIONS}
        wanted = {k: v for k, v in names.items() if v[0] < settings.steps and k not in self.configs}
        half = ends - (self.goal.to == "plain") * (ends - time.monotonic()) / 2  # plans of caches have the rest
        if wanted:
            self.say(f"drawing {len(self.texts)} pictures with the teacher of the solvers")
            with fitting(self.pipe, Config(), self.texts, **call) as found:
                for name, (n, moves, polish) in wanted.items():
                    if self.configs and time.monotonic() > half:
                        break
                    plan = found.plan(n, _ORDER, moves, polish)
                    self.say(plan.summary())
                    yield name, Config(solver={"method": "fitted", "plan": plan})
        for share in SHARES if self.goal.to == "plain" else ():
            steps = round(share * settings.steps)
            for inside, site in SITES.items():
                if (name := f"dp {steps}{inside}") not in self.configs and time.monotonic() < ends:
                    self.say(f"planning {steps} of {settings.steps} steps{inside}")
                    asked = Config(cache={"method": "dp", "computed_steps": steps, "site": site, "ridge": _RIDGE})
                    yield name, calibrate(self.pipe, asked, self.texts[:8], **call)

    def _measure(self, configs: Mapping[str, Config], prompts: Prompts, rounds: int) -> list[Tried]:
        seen = Pictures()
        contenders = [Contender(name, "fastdiff", self.settings.steps, config) for name, config in configs.items()]
        settings = self.settings.model_copy(update={"rounds": rounds, "converged_steps": None})
        rows = run(self.pipe, contenders, prompts, settings, observer=seen)
        for row in rows:
            if row.error:
                self.say(f"{row.name} is left out: {row.error}")
        goal = seen.images["baseline"] if self.goal.to == "plain" else self._fine(len(prompts))
        return [
            Tried(row.name, row.latency_s, row.speedup, [float(d) for d in psnr(seen.images[row.name], goal)])
            for row in rows
            if row.latency_s is not None and row.speedup is not None
        ]

    def _fine(self, count: int) -> NDArray:
        """The first pictures of a fine solution, drawn once: second order where the scheduler can be exchanged, else
        many steps of its own."""
        settings, own = self.settings, self.pipe.scheduler
        try:
            self.pipe.scheduler, steps = solver("dpm++", own), _FINE
        except BadConfig:
            steps = settings.converged_steps or 500
        try:
            for first in range(len(self._goals), count, settings.batch):
                places = range(first, min(first + settings.batch, count))
                texts, seeds = [self.prompts.texts[k] for k in places], [settings.seed + k for k in places]
                self._goals.extend(draw(self.pipe, texts, seeds, steps, settings.guidance_scale))
        finally:
            self.pipe.scheduler = own
        return np.stack(self._goals[:count])

    def _header(self) -> dict[str, Any]:
        return {
            "version": 1, "model": str(self.pipe.config.get("_name_or_path")), "to": self.goal.to,
            "settings": self.settings.model_dump(mode="json"), "prompts": [*self.prompts.texts], "fit": [*self.texts],
        }  # fmt: skip

    def _resume(self) -> None:
        if not self.file.exists():
            return
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["header"] != self._header():
                raise ValueError("it is of another search")
            self.configs = {name: Config(**values) for name, values in kept["configs"].items()}
            self.screened = [Tried(**values) for values in kept["screened"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadConfig(
                f"{str(self.file)!r} cannot be gone on with ({error}); remove it, or give another output"
            ) from None
        self.say(f"going on with what {self.file.name} holds: {', '.join(self.configs)}")

    def _keep(self) -> None:
        configs = {name: config.model_dump(mode="json") for name, config in self.configs.items()}
        kept = {"header": self._header(), "configs": configs, "screened": [asdict(one) for one in self.screened]}
        output.write(self.file, lambda part: part.write_text(json.dumps(kept) + "\n", encoding="utf-8"))
