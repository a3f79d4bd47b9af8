"""Codecs of fewer bits than `residual`, tried on the embedded models with real processes over gloo.

2 bits and low rank of what changed since the last message, with the error fed back (CompactFusion,
https://arxiv.org/abs/2507.17511). They live here alone until they beat `residual` on some link: see docs/parallel.md.
Rows are written one by one; those that the file has are kept.

    python scripts/trial_codecs.py [--model shapes-unet] [--ranks 2] [--count 4] [--links]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure_parallel import TIMEOUT, alone, drawn, keep, known, quality, read, setting, traffic
from torch import Tensor

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.parallel import exchange
from fastdiff.parallel.codec import Wire, packed_size, raw
from fastdiff.studio.ranks import launch

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-codecs.json"
LEVELS = (0.4528, 1.5104)  # of 2 bits for a normal distribution of variance 1 (Lloyd and Max), either sign
BETWEEN = 0.9816
ROUNDS = 2  # of the power iteration, which starts from the last message's factor
TRIALS = ("bits2", "rank4", "rank8")
Row = dict[str, Any]


class Trial(Wire):
    """As `residual`, with another quantizer of the change."""

    def __init__(self, kind: str) -> None:
        super().__init__("residual")
        self.kind, self.start = kind, torch.empty(0)

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        if self.known is None:
            return packed_size("residual", shape, dtype, True)
        if self.kind == "bits2":
            return 2 * torch.Size(shape[:-1]).numel() + torch.Size(shape[:-1]).numel() * -(-shape[-1] // 4)
        batch, heads, tokens, width = shape
        return 2 * batch * self._rank(shape) * (tokens + heads * width)

    def pack(self, value: Tensor) -> Tensor:
        if self.known is None:
            self.known = value.clone()
            return raw(value)
        change = (value - self.known).float()
        message = _two_bits(change) if self.kind == "bits2" else self._factors(change)
        self.known = self.known + self._back(message, tuple(value.shape)).to(value.dtype)
        return message

    def unpack(self, message: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.known is None:
            self.known = message.view(dtype).reshape(shape)
        else:
            self.known = self.known + self._back(message, shape).to(dtype)
        return self.known

    def _back(self, message: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _from_two_bits(message, shape) if self.kind == "bits2" else self._product(message, shape)

    def _rank(self, shape: tuple[int, ...]) -> int:
        _, heads, tokens, width = shape
        return min(int(self.kind.removeprefix("rank")), tokens, heads * width)

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


def _two_bits(change: Tensor) -> Tensor:
    """A scale in bfloat16 for each row, and four numbers to a byte: the sign, and whether it is large."""
    rows = change.reshape(-1, change.shape[-1])
    scale = rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30).bfloat16()
    codes = (rows < 0).to(torch.uint8) * 2 + (rows.abs() > BETWEEN * scale.float()).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -rows.shape[-1] % 4)).reshape(len(rows), -1, 4)
    weights = torch.tensor([1, 4, 16, 64], dtype=torch.uint8)
    return torch.cat([raw(scale), raw((codes * weights).sum(-1, dtype=torch.uint8))])


def _from_two_bits(message: Tensor, shape: tuple[int, ...]) -> Tensor:
    count, width = torch.Size(shape[:-1]).numel(), shape[-1]
    scale = message[: 2 * count].view(torch.bfloat16).float().reshape(count, 1)
    packed = message[2 * count :].reshape(count, -1, 1)
    codes = (packed >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).reshape(count, -1)[:, :width]
    values = torch.tensor([LEVELS[0], LEVELS[1], -LEVELS[0], -LEVELS[1]])[codes.long()]
    return (values * scale).reshape(shape)


def wanted(model: str, ranks: int) -> Iterator[Row]:
    for method, codec in product(("patch", "distrifusion"), ("residual", *TRIALS)):
        settings = {"method": method, "devices": ranks, "codec": "residual"}
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
        codec = row["codec"]
        made = plain if codec == "residual" else lambda _, codec=codec: Trial(codec)
        exchange.Wire = lambda asked, made=made: made(asked) if asked == "residual" else plain(asked)  # type: ignore
        with fastdiff.accelerate(pipe, parallel=row["parallel"] | {"timeout": TIMEOUT}) as fast:
            told = list(drawn(pipe, prompts, count, handle=fast, latent=not first))
        exchange.Wire = plain  # type: ignore[misc]
        if first:
            found = quality(np.concatenate([images for images, _ in told]), whole, prompts)
            found |= traffic([report for _, report in told], count)
            keep(file, row | found, setting(pipe, count, count))
            print(row["model"], row["ranks"], row["name"], found["psnr"], found["bytes_by_kind"], flush=True)


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
            if rows:
                alone(name, count, count, file, reference, rivals=False)
            if rows and (code := launch(number, TIMEOUT, together, name, rows, count, file, reference)):
                raise SystemExit(code)
    print(json.dumps({row["name"]: row.get("psnr") for row in read(file)["rows"]}))


if __name__ == "__main__":
    typer.run(main)
