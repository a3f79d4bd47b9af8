"""CHORDS beside ParaStep: pictures after as many rounds of the denoiser, on the embedded models.

A round is what cores compute at a time, one step each, so rounds are what a picture takes. CHORDS lives here alone: see
docs/parallel.md for what came out. Its cores are computed one after the other, in one process; ParaStep is the
package's own on real processes over gloo, with the warm-up that gives it as many rounds. Rows are written one by one;
those in the file are kept.

    python scripts/trial_chords.py [--model shapes-unet] [--ranks 2] [--count 4]
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

import fastdiff
from fastdiff.bench import Prompts, prompts_for
from fastdiff.bench.metrics import psnr
from fastdiff.studio.ranks import launch
from scripts.measure_parallel import STEPS, TIMEOUT, drawn, keep, known, quality, read, setting

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-chords.json"
REMARK = "quality at equal rounds; seconds were not measured"
CONVERGED = 500  # steps of the solution that both are approximations of
ROUNDS = {2: (27, 36), 4: (16, 21, 27)}  # by cores: a warm-up of 4 steps, and what CHORDS may prefer
# Where four cores begin, as parts of where the last does: at the same distances; as the authors' eight do, which are
# 0 2 4 8 16 24 32 40 of 50 steps; and each twice as far as the one before.
SPACINGS = {4: {"even": (0, 1 / 3, 2 / 3, 1), "authors'": (0, 0.25, 0.5, 1), "doubling": (0, 1 / 7, 3 / 7, 1)}}
Row: TypeAlias = dict[str, Any]
Jump: TypeAlias = Callable[[Tensor, Tensor, int, int], Tensor]  # latents, output, from a step, to a step: latents


@dataclass
class Core:
    """One solver of the hierarchy: where it is, and what its present segment began with."""

    index: int
    x: Tensor
    begin: int
    first: tuple[Tensor, Tensor] | None = None  # latents and output at `begin`


class Hierarchy:
    """Solvers that begin at later and later steps, each corrected by the one before it when that comes by.

    Source: CHORDS: Diffusion Sampling Accelerator with Multi-core Hierarchical ODE Solvers, algorithm 1,
    https://arxiv.org/abs/2507.15260. Core c begins in round c at step i_c, with one jump G from core c-1. Where core
    c-1 comes to the step s at which the segment of core c began with x_s, with y in its place, core c goes from t to
    x_(t+1) = F(x_t) + G(y, s -> t+1) - G(x_s, s -> t+1), and begins a segment there. The last core ends first, after
    c + N - i_c rounds; the first is the plain solver.
    """

    def __init__(self, jump: Jump, starts: Sequence[int], total: int) -> None:
        """starts: increasing, from 0 on; total: steps of the solver."""
        self.jump, self.starts, self.total = jump, starts, total
        self.rounds = len(starts) - 1 + total - starts[-1]
        # cores and steps in the order in which they are computed here; on devices each round is one of time
        order = ((c, starts[c] + r - c) for r in range(self.rounds) for c in range(min(r + 1, len(starts))))
        self.order = [(c, index) for c, index in order if index < total]
        self._cores: list[Core] = []
        self._told: dict[int, Tensor] = {}
        self._done = 0

    def next(self, x: Tensor, output: Tensor) -> Tensor:
        """The denoiser's output for the latents at this place of `order`, in exchange for those of the next place; at
        the end, the picture's."""
        core = self.order[self._done][0]
        if not self._cores:
            self._cores = [Core(0, x, 0)]
        self._told[core] = output
        self._done += 1
        following = self.order[self._done][0] if self._done < len(self.order) else -1
        if following <= core:
            self._advance()
        return self._cores[following].x

    def _advance(self) -> None:
        """A round is over: every core makes its step."""
        outputs, self._told = self._told, {}
        moved: list[Core] = []
        for c, output in outputs.items():
            core = self._cores[c]
            if core.index == core.begin:
                core.first = core.x, output
            after = core.index + 1
            ahead = Core(after, self.jump(core.x, output, core.index, after), core.begin, core.first)
            if c and self._cores[c - 1].index == core.begin:
                assert core.first is not None
                better = self.jump(self._cores[c - 1].x, outputs[c - 1], core.begin, after)
                ahead = Core(after, ahead.x + better - self.jump(*core.first, core.begin, after), after)
            moved.append(ahead)
        if len(moved) < len(self.starts):
            last, start = self._cores[-1], self.starts[len(moved)]
            moved.append(Core(start, self.jump(last.x, outputs[len(moved) - 1], last.index, start), start))
        self._cores = moved


def jump_of(solver: Any) -> Jump:
    """One step of a solver over any distance: DDIM of a model that predicts velocities, and Euler of a flow."""
    if hasattr(solver, "alphas_cumprod"):
        kept = [*solver.alphas_cumprod[solver.timesteps].tolist(), float(solver.final_alpha_cumprod)]
        assert solver.config.prediction_type == "v_prediction"

        def ddim(x: Tensor, output: Tensor, start: int, end: int) -> Tensor:
            (a, s), (b, r) = ((kept[k] ** 0.5, (1 - kept[k]) ** 0.5) for k in (start, end))
            return b * (a * x - s * output) + r * (a * output + s * x)

        return ddim
    return lambda x, output, start, end: x + (solver.sigmas[end] - solver.sigmas[start]) * output


def on_cores(scheduler: Any, starts: Sequence[int]) -> Any:
    """A scheduler in whose time the pipeline computes all cores, in the order of the hierarchy."""
    made = copy.deepcopy(scheduler)
    plain, cores = made.set_timesteps, list[Hierarchy]()

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        whole = copy.copy(made)  # the times of steps, as the jumps need them
        cores[:] = [Hierarchy(jump_of(whole), starts, len(whole.timesteps))]
        made.timesteps = whole.timesteps[[index for _, index in cores[0].order]]

    def step(output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        return (cores[0].next(sample, output),)

    made.set_timesteps, made.step = set_timesteps, step
    return made


def starts_of(cores: int, rounds: int) -> dict[str, tuple[int, ...]]:
    """Where cores may begin, so that the last ends after so many rounds."""
    last = cores - 1 + STEPS - rounds
    spacings = SPACINGS.get(cores, {"": (0, 1)})
    return {name: tuple(round(part * last) for part in parts) for name, parts in spacings.items()}


def simulated(model: str, cores: int) -> Iterator[Row]:
    for rounds in ROUNDS[cores]:
        yield {"model": model, "ranks": 1, "name": f"one device, {rounds} steps", "rounds": rounds, "steps": rounds}
        for spacing, starts in starts_of(cores, rounds).items():
            name = f"chords {spacing} {'-'.join(map(str, starts))}".replace("  ", " ")
            yield {"model": model, "ranks": cores, "name": name, "rounds": rounds, "starts": starts}


def rivals(model: str, cores: int) -> Iterator[Row]:
    """ParaStep with a warm-up w for which w + (50 - w) / cores, rounded up, is as many rounds."""
    for rounds, order in product(ROUNDS[cores], (1, 2)):
        warmup = next(w for w in range(1, STEPS) if w - (w - STEPS) // cores == rounds)
        settings = {"method": "parastep", "devices": cores, "order": order, "warmup_steps": warmup}
        name = f"parastep order {order}, warm-up {warmup}"
        yield {"model": model, "ranks": cores, "name": name, "rounds": rounds, "parallel": settings}


class Beside:
    """What pictures are compared with, and where the rows go."""

    def __init__(self, pipe: Any, count: int, file: Path, reference: Path) -> None:
        self.pipe, self.count, self.file = pipe, count, file
        self.prompts: Prompts = prompts_for(pipe, count, 0)
        self.whole, self.converged = np.load(reference)

    def keep(self, row: Row, images: NDArray) -> None:
        found = quality(images, self.whole, self.prompts)
        found["psnr_converged"] = round(float(psnr(images, self.converged).mean()), 2)
        keep(self.file, row | found, setting(self.pipe, self.count, self.count) | {"remark": REMARK})
        print(*(row[name] for name in ("model", "ranks", "name", "rounds")), found["psnr"], flush=True)


def loaded(model: str) -> Any:
    torch.set_num_threads(1)
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, prompts: Prompts, steps: int = STEPS) -> NDArray:
    return np.concatenate([images for images, _ in drawn(pipe, prompts, len(prompts), steps)])


def alone(model: str, rows: list[Row], count: int, file: Path, reference: Path) -> None:
    """The pictures that others are compared with, one device with fewer steps, and CHORDS on cores that take turns."""
    pipe = loaded(model)
    prompts = prompts_for(pipe, count, 0)
    np.save(reference, np.stack([pictures(pipe, prompts), pictures(pipe, prompts, CONVERGED)]))
    beside, plain = Beside(pipe, count, file, reference), pipe.scheduler
    whole = {"model": model, "ranks": 1, "name": "one device", "rounds": STEPS, "steps": STEPS}
    beside.keep(whole, beside.whole)
    for row in rows:
        if "starts" in row:
            pipe.scheduler = on_cores(plain, row["starts"])
        beside.keep(row, pictures(pipe, prompts, row.get("steps", STEPS)))
        pipe.scheduler = plain


def together(model: str, rows: list[Row], count: int, file: Path, reference: Path) -> None:
    """ParaStep, in each of its ranks; rank 0 compares and writes."""
    import torch.distributed as dist

    pipe, first = loaded(model), dist.get_rank() == 0
    beside = Beside(pipe, count, file, reference)
    for row in rows:
        with fastdiff.accelerate(pipe, parallel=row["parallel"] | {"timeout": TIMEOUT}) as fast:
            told = list(drawn(pipe, beside.prompts, count, handle=fast, latent=not first))
        if first:
            beside.keep(row, np.concatenate([images for images, _ in told]))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Embedded models; both by default.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of cores; 2 and 4 by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions, in one call.")] = 4,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows are, and go.")] = OUTPUT,
) -> None:
    """Measure what the file does not hold yet."""
    for name in model or ("shapes-unet", "shapes-dit"):
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "plain.npy"
            cores = ranks or tuple(ROUNDS)
            alone_rows = [row for one in cores for row in simulated(name, one) if not known(file, row)]
            rank_rows = {one: [row for row in rivals(name, one) if not known(file, row)] for one in cores}
            if alone_rows or any(rank_rows.values()):
                alone(name, alone_rows, count, file, reference)
            for one, rows in rank_rows.items():
                if rows and (code := launch(one, TIMEOUT, together, name, rows, count, file, reference)):
                    raise SystemExit(code)
    print(json.dumps([[row["model"], row["ranks"], row["name"], row["psnr"]] for row in read(file)["rows"]]))


if __name__ == "__main__":
    typer.run(main)
