"""Codecs of fewer bits than `residual`, tried on the embedded models with real processes over gloo.

2 bits (`bits2`) and low rank of what changed since the last message, with the error fed back (CompactFusion,
https://arxiv.org/abs/2507.17511). What beat `residual` on some link has moved into the package: 2 bits are its codec
`residual2`. Low rank lives here alone: see docs/parallel.md. Rows are written one by one; those in the file are kept.

    python scripts/trial_codecs.py [--model shapes-unet] [--ranks 2] [--count 4]
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure_parallel import STEPS, TIMEOUT, alone, drawn, keep, known, quality, read, setting, traffic
from torch import Tensor

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.parallel import exchange
from fastdiff.parallel.codec import Wire, packed_size, raw
from fastdiff.studio.ranks import launch

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-codecs.json"
ROUNDS = 2  # of the power iteration, which starts from the last message's factor
TRIALS = ("bits2", "rank4", "rank8")
Row = dict[str, Any]


class LowRank(Wire):
    """As `residual`, but the change is sent as a product of two narrow matrices."""

    def __init__(self, rank: int) -> None:
        super().__init__("residual")
        self.rank, self.start = rank, torch.empty(0)

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        if self.known is None:
            return packed_size("residual", shape, dtype, True)
        batch, heads, tokens, width = shape
        return 2 * batch * self._rank(shape) * (tokens + heads * width)

    def pack(self, value: Tensor) -> Tensor:
        if self.known is None:
            self.known = value.clone()
            return raw(value)
        change = (value - self.known).float()
        message = self._factors(change)
        self.known = self.known + self._product(message, tuple(value.shape)).to(value.dtype)
        return message

    def unpack(self, message: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.known is None:
            self.known = message.view(dtype).reshape(shape)
        else:
            self.known = self.known + self._product(message, shape).to(dtype)
        return self.known

    def _rank(self, shape: tuple[int, ...]) -> int:
        _, heads, tokens, width = shape
        return min(self.rank, tokens, heads * width)

    def _factors(self, change: Tensor) -> Tensor:
        """Tokens x channels of all heads, as a product of two narrow matrices in bfloat16."""
        shape = tuple(change.shape)
        batch, heads, tokens, width = shape
        flat = change.transpose(1, 2).reshape(batch, tokens, heads * width)
        right = self.start if len(self.start) else flat.mT[..., : self._rank(shape)].contiguous()
        for _ in range(ROUNDS):
            left = torch.linalg.qr(flat @ right)[0]
            right = flat.mT @ left
        self.start = right
        return torch.cat([raw(left.bfloat16()), raw(right.bfloat16())])

    def _product(self, message: Tensor, shape: tuple[int, ...]) -> Tensor:
        batch, heads, tokens, width = shape
        both, rank = message.view(torch.bfloat16).float(), self._rank(shape)
        left, right = both.split([batch * tokens * rank, batch * heads * width * rank])
        flat = left.view(batch, tokens, rank) @ right.view(batch, heads * width, rank).mT
        return flat.view(batch, tokens, heads, width).transpose(1, 2)


def wanted(model: str, ranks: int) -> Iterator[Row]:
    for method, codec in product(("patch", "distrifusion"), ("residual", *TRIALS)):
        settings = {"method": method, "devices": ranks, "codec": "residual2" if codec == "bits2" else "residual"}
        yield {"model": model, "ranks": ranks, "name": f"{method} {codec}", "codec": codec, "parallel": settings}


def together(model: str, rows: list[Row], count: int, file: Path, reference: Path) -> None:
    """All rows of one number of ranks, in each of them; rank 0 compares and writes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts, first, whole = prompts_for(pipe, count, 0), dist.get_rank() == 0, np.load(reference)
    plain: Any = exchange.Wire
    for row in rows:
        if row["codec"].startswith("rank"):
            rank = int(row["codec"].removeprefix("rank"))
            exchange.Wire = lambda codec, rank=rank: LowRank(rank) if codec == "residual" else plain(codec)  # type: ignore
        with fastdiff.accelerate(pipe, parallel=row["parallel"] | {"timeout": TIMEOUT}) as fast:
            told = list(drawn(pipe, prompts, count, handle=fast, latent=not first))
        exchange.Wire = plain  # type: ignore[misc]
        if first:
            found = quality(np.concatenate([images for images, _ in told]), whole, prompts)
            found |= traffic([report for _, report in told], count)
            keep(file, row | found, setting(pipe, count, count))
            print(row["model"], row["ranks"], row["name"], found["psnr"], found["bytes_by_kind"], flush=True)


def rivals(model: str, ranks: int, count: int, file: Path, reference: Path) -> None:
    """One device with as many steps as `patch` with `residual` takes on a link so slow that bytes are all of the time,
    while a trial takes all of its steps: what each trial has to be nearer than. Faster links leave the rival more."""
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts, whole = prompts_for(pipe, count, 0), np.load(reference)
    sent = {
        row["codec"]: row["bytes_per_step_and_image"]
        for row in read(file)["rows"]
        if (row["model"], row["ranks"], row["name"].split()[0]) == (model, ranks, "patch")
    }
    for codec in TRIALS:
        steps = math.ceil(STEPS * sent.get(codec, math.inf) / sent["residual"]) if codec in sent else STEPS
        row = {"model": model, "ranks": 1, "name": f"one device, {steps} steps", "steps": steps}
        if steps < STEPS and not known(file, row):
            images = np.concatenate([some for some, _ in drawn(pipe, prompts, count, steps)])
            keep(file, row | quality(images, whole, prompts), setting(pipe, count, count))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Embedded models; both by default.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of processes; 2 by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions, in one call.")] = 4,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows are, and go.")] = OUTPUT,
) -> None:
    """Measure what the file does not hold yet."""
    torch.set_num_threads(1)
    for number, name in product(ranks or (2,), model or ("shapes-unet", "shapes-dit")):
        rows = [row for row in wanted(name, number) if not known(file, row)]
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "plain.npy"
            alone(name, count, count, file, reference, rivals=False)
            if rows and (code := launch(number, TIMEOUT, together, name, rows, count, file, reference)):
                raise SystemExit(code)
            rivals(name, number, count, file, reference)
    print(json.dumps({row["name"]: row.get("psnr") for row in read(file)["rows"]}))


if __name__ == "__main__":
    typer.run(main)
