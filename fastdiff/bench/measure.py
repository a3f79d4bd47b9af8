"""Runs a benchmark: warm-up, quality pass, interleaved timed rounds, all in one process on one pipeline."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.bench import checker
from fastdiff.errors import NotReversible, UnsupportedModel

from .metrics import psnr, ssim
from .peer import Running
from .plan import Contender, Settings, fewer_steps, other_solvers
from .probe import Probe
from .prompts import Prompts
from .row import Row, environment, model_name


class Observer:
    """Told how a benchmark goes on; the unit of work is one denoising step of one image."""

    def planned(self, work: int) -> None:
        """So much work in all; may be corrected later."""

    def done(self, name: str, work: int) -> None:
        """A pipeline call for `name` has ended."""

    def drawn(self, name: str, images: NDArray, decibels: NDArray) -> None:
        """All images of a row, (count, height, width, 3) in [0, 1], and the PSNR of each."""


@dataclass
class _Trial:
    """What was measured of one contender so far."""

    contender: Contender
    counts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    denoising: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None


def draw(
    call: Callable[..., Any], texts: Sequence[str], seeds: Sequence[int], steps: int, guidance_scale: float | None
) -> NDArray[np.float32]:
    """One call of a pipeline, an image for each text and seed: (count, height, width, 3) in [0, 1]."""
    options: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = call(list(texts), num_inference_steps=steps, generator=generators, output_type="np", **options)
    images = np.asarray(output[0], np.float32)
    if images.shape[0] != len(texts) or images.ndim != 4:
        raise UnsupportedModel(f"bench compares images; the pipeline returned an array of {images.shape}")
    if not np.isfinite(images).all():
        raise FloatingPointError("the images hold NaN or infinite pixels")
    return images


def to_bytes(images: NDArray) -> NDArray[np.uint8]:
    """As diffusers rounds them."""
    return (images * 255).round().clip(0, 255).astype(np.uint8)


def run(
    pipe: Any,
    contenders: Sequence[Contender],
    prompts: Prompts,
    settings: Settings,
    *,
    observer: Observer | None = None,
    command: str = "",
) -> list[Row]:
    """Measure the stock pipeline, the contenders, and the stock pipeline with as few steps as each of them computes.

    The pipeline is accelerated and restored between calls and is afterwards as it was. A contender that fails becomes
    a row with an `error`, and the others go on; only a failure of the stock pipeline itself is raised.
    """
    return _Bench(pipe, prompts, settings, observer or Observer()).run(contenders, command)


class _Bench:
    def __init__(self, pipe: Any, prompts: Prompts, settings: Settings, observer: Observer) -> None:
        self.pipe, self.prompts, self.settings, self.observer = pipe, prompts, settings, observer
        self.references: NDArray | None = None
        self.converged: NDArray | None = None
        self.without_converged: str | None = None
        self.remarks: list[str] = []
        self.stock: torch.Tensor | None = None

    def run(self, contenders: Sequence[Contender], command: str) -> list[Row]:
        trials = [_Trial(Contender("baseline", "baseline", self.settings.steps)), *map(_Trial, contenders)]
        with _quiet(self.pipe):
            self._plan(trials)
            for trial in trials:
                self._attempt(self._warm_up, trial)
            rivals = self._rivals(trials)
            trials += rivals
            self._plan(trials)
            for trial in rivals:
                self._attempt(self._warm_up, trial)
            self._solve_converged()
            self._plan(trials)
            for trial in trials:
                self._attempt(self._judge, trial)
            for number in range(self.settings.rounds):
                shift = number * len(trials) // self.settings.rounds  # nobody is always early or late in a round
                for trial in (*trials[shift:], *trials[:shift]):
                    self._attempt(partial(self._time, number=number), trial)
        facts = self._facts(command)
        return [_row(trial, trials[0], facts) for trial in trials]

    def _rivals(self, trials: list[_Trial]) -> list[_Trial]:
        counts = {trial.counts[0] for trial in trials if trial.error is None}
        others, left_out = other_solvers(self.pipe.scheduler, self.settings.solvers)
        self.remarks += left_out
        found = fewer_steps(counts, self.settings.steps, trials[0].counts[0], others)
        return [_Trial(rival, notes=_stride(rival, self.pipe.scheduler)) for rival in found]

    def _plan(self, trials: list[_Trial]) -> None:
        calls = 1 + len(self.prompts) + self.settings.rounds
        work = sum(trial.contender.steps * calls for trial in trials)
        if self.without_converged is None:
            work += (self.settings.converged_steps or 0) * len(self.prompts)
        self.observer.planned(work)

    def _attempt(self, stage: Callable[[_Trial], None], trial: _Trial) -> None:
        """One stage of one trial; whatever goes wrong in a contender ends that contender only."""
        if trial.error is not None:
            return
        try:
            stage(trial)
        except Exception as error:
            if trial.contender.kind == "baseline":
                raise UnsupportedModel(f"the pipeline fails without any acceleration: {_reason(error)}") from error
            trial.error = _reason(error)
        finally:
            gc.collect()
            if self.pipe.device.type == "cuda":
                torch.cuda.empty_cache()

    def _draw(self, running: Running, indices: Sequence[int], steps: int) -> NDArray[np.float32]:
        texts, seeds = [self.prompts.texts[k] for k in indices], [self.settings.seed + k for k in indices]
        return draw(running.call, texts, seeds, steps, self.settings.guidance_scale)

    def _draw_all(self, running: Running, name: str, steps: int, counts: list[int]) -> NDArray[np.float32]:
        """All prompts; what each call computed is added to `counts`."""
        chunks = []
        for start in range(0, len(self.prompts), self.settings.batch):
            indices = range(start, min(start + self.settings.batch, len(self.prompts)))
            chunks.append(self._draw(running, indices, steps))
            counts += _known(running.computed())
            self.observer.done(name, steps * len(indices))
        return np.concatenate(chunks)

    def _warm_up(self, trial: _Trial) -> None:
        """A full call that also tells how many steps are computed."""
        contender = trial.contender
        with contender.installed(self.pipe, counted=True) as running:
            self._draw(running, [0], contender.steps)
            trial.counts += _known(running.computed())
            trial.notes += running.notes()
        self.observer.done(contender.name, contender.steps)
        if contender.kind in ("baseline", "peer"):
            self._check_stock(contender)

    def _check_stock(self, contender: Contender) -> None:
        """Whoever leaves the stock pipeline drawing something else spoils the rows of all others."""
        latents = self.pipe(
            self.prompts.texts[0],
            num_inference_steps=min(3, self.settings.steps),
            generator=torch.Generator().manual_seed(self.settings.seed),
            output_type="latent",
        )[0]
        if self.stock is None:
            self.stock = latents
        elif not torch.equal(latents, self.stock):
            self.remarks.append(f"the stock pipeline drew another picture after {contender.name}: trust no row here")
            raise NotReversible("the stock pipeline is not itself any more")

    def _judge(self, trial: _Trial) -> None:
        contender = trial.contender
        counts: list[int] = []
        with contender.installed(self.pipe) as running:
            images = self._draw_all(running, contender.name, contender.steps, counts)
        if self.references is None:
            self.references = images
        decibels = psnr(images, self.references)
        trial.quality = {"psnr": float(decibels.mean()), "ssim": float(ssim(images, self.references).mean())}
        trial.spread = {"psnr_std": float(decibels.std()), "psnr_min": float(decibels.min())}
        if self.converged is not None:
            trial.quality["psnr_converged"] = float(psnr(images, self.converged).mean())
        if self.prompts.scenes is not None:
            pairs = zip(to_bytes(images), self.prompts.scenes, strict=True)
            marks = checker.summary([checker.mark(image, scene) for image, scene in pairs])
            trial.quality |= {key: marks[key] for key in ("prompt_accuracy", "all_correct")}
        trial.counts += counts
        self.observer.drawn(contender.name, images, decibels)

    def _time(self, trial: _Trial, number: int) -> None:
        contender, index = trial.contender, number % len(self.prompts)
        with contender.installed(self.pipe) as running:
            if contender.slow_start:
                self._draw(running, [index], contender.steps)
            with Probe(running.pipe) as probe:
                self._draw(running, [index], contender.steps)
            trial.counts += _known(running.computed())
        trial.seconds.append(probe.seconds)
        trial.denoising.append(probe.denoising_seconds)
        trial.peaks += [probe.peak_memory_mb] if probe.peak_memory_mb is not None else []
        self.observer.done(contender.name, contender.steps)

    def _solve_converged(self) -> None:
        steps = self.settings.converged_steps
        if steps is None:
            self.without_converged = "no converged reference was asked for"
            return
        try:
            if self._draws_noise():
                self.without_converged = "no converged reference: the scheduler adds noise, so there is no ODE to solve"
            else:
                self.converged = self._draw_all(Running(self.pipe, self.pipe), "converged", steps, [])
        except Exception as error:  # some schedulers cannot take so many steps
            self.without_converged = f"no converged reference: {_reason(error)}"

    def _draws_noise(self) -> bool:
        """Does the scheduler use random numbers? Then a longer run leaves the generators in another state."""
        states = []
        for steps in (2, 3):
            generator = torch.Generator().manual_seed(self.settings.seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings.seed)
                self.pipe(
                    [self.prompts.texts[0]], num_inference_steps=steps, generator=[generator], output_type="latent"
                )
                states.append(torch.cat([generator.get_state(), torch.get_rng_state()]))
        own_source = "SDE" in type(self.pipe.scheduler).__name__  # a Brownian tree that no generator shows
        return own_source or not torch.equal(*states)

    def _facts(self, command: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": model_name(self.pipe),
            "scheduler": type(self.pipe.scheduler).__name__,
            "prompts": len(self.prompts),
            "batch": settings.batch,
            "rounds": settings.rounds,
            "seeds": [settings.seed + k for k in range(len(self.prompts))],
            "guidance_scale": settings.guidance_scale,
            "environment": environment(self.pipe),
            "command": command,
            "remarks": ([self.without_converged] if self.without_converged else []) + self.remarks,
        }  # fmt: skip


def _row(trial: _Trial, baseline: _Trial, facts: dict[str, Any]) -> Row:
    facts = dict(facts)
    notes = [*facts.pop("remarks"), *trial.notes]
    measured: dict[str, Any] = {}
    spread: dict[str, float] = {}
    if trial.error is None:
        latency, denoising = statistics.median(trial.seconds), statistics.median(trial.denoising)
        low, high = np.percentile(trial.seconds, (25, 75))
        measured = {
            "computed_steps": statistics.median_low(trial.counts[-len(trial.seconds) :]),
            "latency_s": latency,
            "latency_iqr_s": float(high - low),
            "denoising_s": denoising,
            "speedup": statistics.median(baseline.seconds) / latency,
            "speedup_denoising": statistics.median(baseline.denoising) / denoising if denoising else None,
            "peak_memory_mb": max(trial.peaks, default=None),
            **trial.quality,
        }
        spread = trial.spread | {"computed_steps_min": min(trial.counts), "computed_steps_max": max(trial.counts)}
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in measured.items()}
    contender = trial.contender
    if contender.scheduler is not None:
        facts["scheduler"] = type(contender.scheduler).__name__
    return Row(
        name=contender.name,
        kind=contender.kind,
        steps=contender.steps,
        config=contender.record(),
        spread={key: round(value, 4) for key, value in spread.items()},
        notes=notes,
        error=trial.error,
        **rounded,
        **facts,
    )


def _known(count: int | None) -> list[int]:
    return [] if count is None else [count]


def _stride(rival: Contender, scheduler: Any) -> list[str]:
    """diffusers' DDIM steps by a whole number of training steps, whatever its list of timesteps says."""
    trained = scheduler.config.get("num_train_timesteps", 0)
    if rival.scheduler is None and type(scheduler).__name__ == "DDIMScheduler" and trained % rival.steps:
        return [
            f"{trained} is no multiple of {rival.steps}: diffusers' DDIM rounds its stride down, which costs quality"
        ]
    return []


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without what would be timed too: the pipeline's own bars, and garbage collections over all of torch's objects."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        pipe.set_progress_bar_config(**before)
