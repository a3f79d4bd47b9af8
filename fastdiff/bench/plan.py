"""What a benchmark measures: contenders and settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fastdiff.config import Config, Layer, layers_of, parse_set, presets, resolve
from fastdiff.errors import BadConfig, UnknownName
from fastdiff.method import Settings as _Frozen
from fastdiff.patch import PatchSet
from fastdiff.pipelines.accelerate import accelerate
from fastdiff.pipelines.families import anatomies
from fastdiff.pipelines.loading import call_defaults, embedded_name
from fastdiff.pipelines.solving.schedulers import check_name, solver, title

from .peer import Peer, Running
from .peers import peers_for
from .row import Kind


class Settings(_Frozen):
    """How a benchmark is run."""

    steps: int = Field(ge=1, description="num_inference_steps of the baseline and of every accelerated row")
    rounds: int = Field(5, ge=1, description="timed calls a row, interleaved over the rows")
    seed: int = Field(0, ge=0, description="image k has seed + k")
    guidance_scale: float | None = Field(None, ge=0, description="None leaves the pipeline's default")
    batch: int = Field(8, ge=1, description="images a call in the quality pass")
    converged_steps: int | None = Field(500, ge=2, description="steps of the converged reference; None leaves it out")
    solvers: tuple[str, ...] = Field((), description="other schedulers that fewer steps are taken with too")

    @classmethod
    def of(cls, pipe: Any, steps: int | None, guidance_scale: float | None, **others: Any) -> Settings:
        """Settings with the pipeline's own number of steps, and the embedded models' guidance, where None is given."""
        usual = call_defaults(pipe)
        if guidance_scale is None:
            guidance_scale = usual.get("guidance_scale")
        return cls(steps=steps or usual["num_inference_steps"], guidance_scale=guidance_scale, **others)


@dataclass(frozen=True)
class Contender:
    """One row to be: the stock pipeline, with a config the accelerated one, or a rival, or another scheduler."""

    name: str
    kind: Kind
    steps: int
    config: Config | None = None
    peer: Peer | None = None
    scheduler: Any = None  # None is the pipeline's own

    @property
    def slow_start(self) -> bool:
        """The first call after an install is not like the others."""
        return self.config is not None and (self.config.compile.enabled or self.config.quant is not None)

    def record(self) -> dict[str, Any]:
        """What a row says of how it was made."""
        return self.peer.record() if self.peer else (self.config or Config()).model_dump(mode="json")

    @contextmanager
    def installed(self, pipe: Any, *, counted: bool = False) -> Iterator[Running]:
        """The pipeline as this contender has it; `counted` puts a clock on a stock one, to learn its steps."""
        if self.peer is not None:
            with self.peer.installed(pipe) as running:
                yield running
            return
        with _scheduled(pipe, self.scheduler):
            if self.config is None and not counted:
                yield Running(pipe, pipe)
                return
            with accelerate(pipe, self.config or Config()) as handle:
                yield Running(pipe, pipe, lambda: handle.report.computed, lambda: handle.report.notes)


@contextmanager
def _scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    patches = PatchSet()
    if scheduler is not None:
        patches.set(pipe, "scheduler", scheduler)
    try:
        yield
    finally:
        patches.restore()


def sources(names: Sequence[str], files: Sequence[Path], overrides: Sequence[str]) -> dict[str, list[Layer]]:
    """The layers of each preset and config file (all presets if neither is given), with `overrides` (a.b=c) on top.

    A folder stands for the .toml files in it. Needs no model. Raises BadConfig for what does not exist or cannot be
    read.
    """
    tables = [("--set", parse_set(assignment)) for assignment in overrides]
    found: dict[str, list[Layer]] = {}
    given: list[str | Path] = [*dict.fromkeys(names), *dict.fromkeys(path for file in files for path in _listed(file))]
    for source in given or presets():
        label = " ".join([source.stem if isinstance(source, Path) else source, *overrides])
        if label in found:
            raise BadConfig(f"two configs would be called {label!r}; rename one of the files")
        found[label] = [*layers_of(source), *tables]
    return found


def _listed(file: Path) -> list[Path]:
    if not file.is_dir():
        return [file]
    found = sorted(file.glob("*.toml"))
    if not found:
        raise BadConfig(f"{str(file)!r} holds no .toml file; name a config file, or a folder with some")
    return found


def contenders(pipe: Any, layers: Mapping[str, Sequence[Layer]], steps: int) -> list[Contender]:
    """A contender for each named config. Raises BadConfig for a config that means nothing for this model."""
    family, model = anatomies(pipe)[0].family, embedded_name(pipe)
    return [Contender(name, "fastdiff", steps, resolve(stack, family, model).config) for name, stack in layers.items()]


def rivals(pipe: Any, settings: Settings, named: Sequence[str] = ()) -> list[Contender]:
    """A contender for each rival of this kind of denoiser, installed or not; of those whose name holds a word of
    `named`, if there are such words. Raises UnknownName for a word that no name holds."""
    found = peers_for(pipe, settings.steps, settings.guidance_scale)
    for word in named:
        if not any(word in peer.name for peer in found):
            raise UnknownName("--peer", word, [peer.name for peer in found])
    return [
        Contender(peer.name, "peer", settings.steps, peer=peer)
        for peer in found
        if not named or any(word in peer.name for word in named)
    ]


def other_solvers(scheduler: Any, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Schedulers that solve the same ODE, by title, without the pipeline's own; and why others are left out."""
    found, remarks = {}, []
    for name in names:
        check_name(name)
        try:
            candidate = solver(name, scheduler)
        except BadConfig as error:
            remarks.append(f"no fewer steps with {title(name)}: {error}")
            continue
        if type(candidate) is not type(scheduler) or "@" in name:
            found[title(name)] = candidate
    return found, remarks


def fewer_steps(
    computed: Iterable[int], steps: int, evaluations: int, others: Mapping[str, Any] | None = None
) -> list[Contender]:
    """The honest rivals: the stock pipeline with as many evaluations as each row computes.

    `evaluations` is what `steps` cost the stock pipeline, which is more than `steps` for Heun and PNDM. `others` are
    schedulers of one evaluation a step, by title; they take at most 8 of those numbers, evenly picked.
    """
    computed = set(computed)
    wanted = {max(1, round(count * steps / evaluations)) for count in computed}
    found = [Contender(f"{n} steps", "fewer_steps", n) for n in sorted(wanted, reverse=True) if n < steps]
    for other, scheduler in (others or {}).items():
        counts = sorted((n for n in computed if 0 < n < evaluations), reverse=True)
        counts = [counts[round(k)] for k in np.linspace(0, len(counts) - 1, min(8, len(counts)))]
        found += [Contender(f"{n} steps {other}", "fewer_steps", n, scheduler=scheduler) for n in counts]
    return found
