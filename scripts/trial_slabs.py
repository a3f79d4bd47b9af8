"""Latents cut into overlapping slabs, each denoised as if it were a picture: bytes for videos, what pictures lose.

Latent Parallelism lives here alone: see docs/parallel.md for what came out. Bytes that a rank sends in a step are
counted on a model of Wan's size without weights; slabs send their part of the output to every other rank. Pictures are
those of the embedded models, with all slabs computed in one process. Rows are written one by one; those in the file
are kept.

    python scripts/trial_slabs.py [--model shapes-unet] [--count 4]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import WanTransformer3DModel
from torch import Tensor

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.errors import FastdiffError
from fastdiff.parallel import REGISTRY
from fastdiff.parallel.rehearsal import rehearse
from fastdiff.patch import PatchSet
from fastdiff.pipelines.families import FAMILIES, anatomies, recognise
from scripts.measure_parallel import STEPS, Row, drawn, keep, known, quality, read, setting

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-slabs.json"
REMARK = "bytes are counted on the meta device; quality is that of pictures, no trained model of videos being here"
VIDEOS = {"480p, 81 frames": (21, 60, 104), "720p, 81 frames": (21, 90, 160), "480p, 321 frames": (81, 60, 104)}
EXACT, RANKS, SLABS = ("patch", "ulysses", "ring", "pipefusion"), (2, 4), (2, 4)
OVERLAPS = (0.5, 1.0)  # of a slab's own length, on each side
PATCH = 2  # slabs begin at multiples of so many latents, as the patches of transformers do
UNIT = {"shapes-unet": 4, "shapes-dit": PATCH}  # what all levels of down-sampling divide


def spans(length: int, slabs: int, overlap: float, unit: int) -> list[tuple[int, int]]:
    """Begin and end of each slab: an even part of the units, and so much more on each side as there is."""
    edges = [round(k * length / slabs / unit) * unit for k in range(slabs + 1)]
    more = math.ceil(overlap * length / slabs / unit) * unit
    return [(max(0, a - more), min(length, b + more)) for a, b in pairwise(edges)]


def weights(length: int, parts: list[tuple[int, int]]) -> list[Tensor]:
    """For each slab, how much it counts at each of its places: less towards an end that another covers, 1 in all."""
    raw = []
    for begin, end in parts:
        place = torch.arange(begin, end, dtype=torch.float64)
        up = place - begin + 1 if begin else torch.full_like(place, length)
        down = end - place if end < length else torch.full_like(place, length)
        raw.append(torch.minimum(up, down).clamp(max=max(1, end - begin)))
    total = torch.zeros(length, dtype=torch.float64)
    for (begin, end), part in zip(parts, raw, strict=True):
        total[begin:end] += part
    return [part / total[begin:end] for (begin, end), part in zip(parts, raw, strict=True)]


def in_slabs(forward: Callable[..., Any], denoiser: Any, slabs: int, overlap: float, unit: int) -> Callable[..., Any]:
    """A denoiser's forward on slabs of the latents, along another dimension in each step.

    Source: Latent Parallelism, https://arxiv.org/abs/2512.07350: step i is cut along dimension i mod d, and what
    slabs overlap in is weighted by place. Position embeddings are those of the places in the whole picture.
    """
    made = [0]

    @wraps(forward)
    def cut(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        first = "hidden_states" if "hidden_states" in kwargs else None
        x = kwargs[first] if first else args[0]
        dim = 2 + made[0] % (x.ndim - 2)
        made[0] += 1
        parts, whole = spans(x.shape[dim], slabs, overlap, unit), torch.zeros_like(x)
        for (begin, end), weight in zip(parts, weights(x.shape[dim], parts), strict=True):
            slab = x.narrow(dim, begin, end - begin)
            given = (args, kwargs | {first: slab}) if first else ((slab, *args[1:]), kwargs)
            with placed(denoiser, x, dim, begin, end):
                found = forward(*given[0], **given[1])[0]
            shape = [-1 if k == dim else 1 for k in range(x.ndim)]
            whole.narrow(dim, begin, end - begin).add_(found * weight.to(found.dtype).view(shape))
        return (whole,)

    return cut


@contextmanager
def placed(denoiser: Any, x: Tensor, dim: int, begin: int, end: int) -> Iterator[None]:
    """Of learned or fixed position embeddings, which a picture takes from the middle of a table, those of a slab."""
    table = getattr(denoiser, "pos_embed", None)
    if table is None:
        yield
        return
    size = table.patch_size
    height, width = (side // size for side in x.shape[2:])
    whole = table.cropped_pos_embed(*x.shape[2:]).unflatten(1, (height, width))
    own = whole.narrow(dim - 1, begin // size, (end - begin) // size).flatten(1, 2)
    table.cropped_pos_embed = lambda *_: own
    yield
    del table.cropped_pos_embed


@contextmanager
def cut_up(pipe: Any, slabs: int, overlap: float, unit: int) -> Iterator[None]:
    with PatchSet() as patches:
        (anatomy,) = anatomies(pipe)
        how = anatomy.denoiser, slabs, overlap, unit
        patches.wrap_forward(anatomy.denoiser, lambda forward: in_slabs(forward, *how))
        yield
        patches.restore()


def counted(file: Path) -> None:
    """Bytes a step of Wan 2.1 14B, guidance in two calls, bfloat16."""
    facts: dict[str, Any] = {}
    for (name, latents), ranks in product(VIDEOS.items(), RANKS):
        sent: dict[str, int | str] = {}
        row = {"model": "Wan 2.1 14B", "ranks": ranks, "name": name, "latents": latents}
        if known(file, row):
            continue
        with torch.device("meta"):
            anatomy = recognise(WanTransformer3DModel().bfloat16().eval(), "transformer", FAMILIES)
            given = torch.empty(1, 16, *latents, dtype=torch.bfloat16)
            text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
            call = ((given, torch.empty(1, dtype=torch.long), text), {"return_dict": False})
            for method in EXACT:
                asks: Any = REGISTRY[method](method=method)
                try:
                    found = rehearse(anatomy, [call, call], asks, asks.topology(ranks, 0))
                    sent[method] = found.stale.sent.total()
                except FastdiffError as error:
                    sent[method] = f"not counted: {error}"
        for overlap in OVERLAPS:  # along frames; the rank in the middle, whose slab is longest, to all others
            longest = max(end - begin for begin, end in spans(latents[0], ranks, overlap, 1))
            share = given.numel() * given.element_size() * longest // latents[0]
            sent[f"slabs, overlap {overlap:g}"] = 2 * (ranks - 1) * share
        keep(file, row | {"bytes_per_step": sent}, facts)
        print(ranks, name, sent, flush=True)


def pictures(model: str, count: int, file: Path) -> None:
    torch.set_num_threads(1)
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_for(pipe, count, 0)

    def draw(steps: int = STEPS) -> Any:
        return np.concatenate([images for images, _ in drawn(pipe, prompts, count, steps)])

    def told(row: Row, images: Any) -> None:
        found = quality(images, whole, prompts)
        keep(file, row | found, setting(pipe, count, count) | {"remark": REMARK})
        print(row, found["psnr"], flush=True)

    whole, side = draw(), 16
    for slabs, overlap in product(SLABS, OVERLAPS):
        parts = spans(side, slabs, overlap, UNIT[model])
        longest = max(end - begin for begin, end in parts) / side
        row = {"model": model, "ranks": slabs, "name": f"slabs, overlap {overlap:g}", "share_of_the_latents": longest}
        if not known(file, row):
            with cut_up(pipe, slabs, overlap, UNIT[model]):
                images = draw()
            told(row, images)
        steps = math.ceil(STEPS * longest)
        rival = {"model": model, "ranks": 1, "name": f"one device, {steps} steps", "steps": steps}
        if not known(file, rival):
            told(rival, draw(steps))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Embedded models; both by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions, in one call.")] = 4,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows are, and go.")] = OUTPUT,
) -> None:
    """Measure what the file does not hold yet."""
    counted(file)
    for name in model or ("shapes-unet", "shapes-dit"):
        pictures(name, count, file)
    print(json.dumps([[row["model"], row["name"], row.get("psnr")] for row in read(file)["rows"]]))


if __name__ == "__main__":
    typer.run(main)
