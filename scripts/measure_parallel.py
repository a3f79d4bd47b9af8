"""Quality of every parallel method on the embedded models: real processes over gloo, against one device.

Images come from held-out captions at the settings of `fastdiff bench`. Rows are written one by one, and those that the
file has already are kept, so that a run which was stopped goes on. Times say nothing about speed: all ranks share the
cores of one machine.

    python scripts/measure_parallel.py [--model shapes-unet] [--ranks 2] [--count 32] [--table]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

import fastdiff
from fastdiff import output
from fastdiff.bench import Prompts, checker, prompts_for
from fastdiff.bench.measure import to_bytes
from fastdiff.bench.metrics import PSNR_CAP, psnr, ssim
from fastdiff.bench.row import command, environment
from fastdiff.errors import BadConfig, FastdiffError, PeerLost
from fastdiff.studio.ranks import launch

STEPS, GUIDANCE, SEED = 50, 3.0, 0
TIMEOUT = 900.0  # seconds; other jobs may hold the cores
OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-quality.json"
REMARK = (
    "quality and bytes only: all ranks share the cores of one machine with other jobs, so seconds, waited or computed, "
    "say nothing about speed"
)
Row = dict[str, Any]


def main(
    model: Annotated[list[str] | None, typer.Option(help="Embedded models; both by default.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of processes; 2 and 4 by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 32,
    only: Annotated[str, typer.Option(help="Rows whose name starts so.")] = "",
    table: Annotated[bool, typer.Option("--table", help="Print the file as Markdown and measure nothing.")] = False,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the rows are, and go.")] = OUTPUT,
) -> None:
    """Measure what the file does not hold yet."""
    if table:
        print(markdown(json.loads(file.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    there = read(file)
    if there["rows"] and (there["captions"], there["batch"]) != (count, batch):
        raise BadConfig(
            f"{file.name} holds {there['captions']} captions in batches of {there['batch']}; name another -o"
        )
    with tempfile.TemporaryDirectory() as folder:
        order = product(range(3), ranks or (2, 4), model or ("shapes-unet", "shapes-dit"))
        for turn, number, name in order:  # a run that is stopped has what matters most
            rows = [row for row in wanted(name, number) if row["name"].startswith(only) and not known(file, row)]
            rows = [row for row in rows if turn_of(row["parallel"]) == turn]
            if not rows:
                continue
            reference = Path(folder) / f"{name}.npy"
            alone(name, count, batch, file, reference, rivals=turn > 0)
            code = launch(number, TIMEOUT, together, name, rows, count, batch, file, reference)
            if code:
                raise SystemExit(code)


def turn_of(parallel: dict[str, Any]) -> int:
    """The methods as they are come first, then their variants, then both with a short warm-up."""
    if parallel.get("warmup_steps", 4) != 4:
        return 2
    return int(bool({"codec", "refresh", "synchronous"} & parallel.keys()) or parallel["method"] == "ulysses")


def wanted(model: str, ranks: int) -> Iterator[Row]:
    """The rows of one model and number of ranks."""

    def row(name: str, **settings: Any) -> Row:
        return {"model": model, "ranks": ranks, "name": name, "parallel": settings | {"devices": ranks}}

    def warmed(name: str, **settings: Any) -> Iterator[Row]:
        for steps in (1, 4):
            yield row(f"{name}, warm-up {steps}", **settings, warmup_steps=steps)

    yield row("patch", method="patch")
    yield from warmed("pipefusion", method="pipefusion")
    for name in ("ring", "token_ring"):
        yield row(name, method=name)
    yield from warmed("distrifusion", method="distrifusion")
    yield from warmed("pcpp p=0.3", method="pcpp", portion=0.3)
    for order in (1, 2):
        yield from warmed(f"parastep p={ranks} order {order}", method="parastep", order=order)
    if ranks == 2:
        yield row("cfg", method="cfg", cfg=2)
    else:
        yield from warmed("distrifusion cfg=2", method="distrifusion", cfg=2)
        yield row("parastep p=2 order 2 cfg=2, warm-up 4", method="parastep", order=2, cfg=2, warmup_steps=4)
    yield from warmed("pcpp p=0.3 refresh 5", method="pcpp", portion=0.3, refresh=5)
    yield from warmed("pcpp p=0.3 synchronous", method="pcpp", portion=0.3, synchronous=True)
    for codec in ("int8", "residual"):
        yield from warmed(f"distrifusion {codec}", method="distrifusion", codec=codec)
        yield row(f"patch {codec}", method="patch", codec=codec)
    yield row("ulysses", method="ulysses")


def alone(model: str, count: int, batch: int, file: Path, reference: Path, *, rivals: bool) -> None:
    """One device: the images that all others are compared with, and the plain pipeline with as few steps as ParaStep
    has rounds, which is its honest rival."""
    fewer = sorted({rounds(warmup, p) for p in (2, 4) for warmup in (1, 4)}, reverse=True) if rivals else []
    left = [row for row in plain(model, [STEPS, *fewer]) if not known(file, row)]
    if not left and reference.exists():
        return
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_for(pipe, count, SEED)
    if not reference.exists():
        np.save(reference, np.concatenate([images for images, _ in drawn(pipe, prompts, batch)]))
    whole = np.load(reference)
    for row in left:
        few = row["steps"] < STEPS
        images = np.concatenate([x for x, _ in drawn(pipe, prompts, batch, row["steps"])]) if few else whole
        keep(file, row | quality(images, whole, prompts), setting(pipe, count, batch))


def plain(model: str, counts: list[int]) -> list[Row]:
    names = ["one device", *(f"one device, {steps} steps" for steps in counts[1:])]
    return [{"model": model, "ranks": 1, "name": n, "steps": k} for n, k in zip(names, counts, strict=True)]


def rounds(warmup: int, step: int) -> int:
    """How many times ParaStep's ranks compute one after the other."""
    return warmup + -(-(STEPS - warmup) // step)


def together(model: str, rows: list[Row], count: int, batch: int, file: Path, reference: Path) -> None:
    """All rows of one number of ranks, in each of them; rank 0 compares and writes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe: Any = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts, first = prompts_for(pipe, count, SEED), dist.get_rank() == 0
    whole = np.load(reference)
    for row in rows:
        began, cpu = time.perf_counter(), time.process_time()
        try:
            with fastdiff.accelerate(pipe, parallel=row["parallel"] | {"timeout": TIMEOUT}) as fast:
                images, reports = [], []
                for some, report in drawn(pipe, prompts, batch, handle=fast, latent=not first):
                    images.append(some)
                    reports.append(report)
            found = quality(np.concatenate(images), whole, prompts) | traffic(reports, count) if first else {}
        except PeerLost:
            raise
        except FastdiffError as error:
            found = {"refused": str(error)}
        if first:
            wall, busy = time.perf_counter() - began, time.process_time() - cpu
            spent = {"wall_seconds": round(wall, 1), "cpu_seconds": round(busy, 1)}
            keep(file, row | found | spent, setting(pipe, count, batch))
            print(row["model"], row["ranks"], row["name"], found, spent, flush=True)


def drawn(
    pipe: Any, prompts: Prompts, batch: int, steps: int = STEPS, handle: Any = None, latent: bool = False
) -> Iterator[tuple[NDArray, dict[str, Any]]]:
    """Images (count, height, width, 3) in [0, 1] and the report of each call; `latent` leaves the decoding out."""
    for start in range(0, len(prompts), batch):
        texts = list(prompts.texts[start : start + batch])
        seeds = [torch.Generator().manual_seed(SEED + start + k) for k in range(len(texts))]
        kind = "latent" if latent else "np"
        made = pipe(
            texts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=seeds, output_type=kind
        )[0]  # fmt: skip
        yield np.asarray(made, np.float32), handle.report.to_dict() if handle else {}


def quality(images: NDArray, whole: NDArray, prompts: Prompts) -> Row:
    assert prompts.scenes is not None
    marks = [[checker.mark(a, s) for a, s in zip(to_bytes(x), prompts.scenes, strict=True)] for x in (images, whole)]
    ours, theirs = (checker.summary(some)["prompt_accuracy"] for some in marks)
    change = 100 * np.array([a.accuracy - b.accuracy for a, b in zip(*marks, strict=True)])
    error = float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else 0.0
    decibels = psnr(images, whole)
    return {
        "psnr": round(float(decibels.mean()), 2), "psnr_min": round(float(decibels.min()), 2),
        "ssim": round(float(ssim(images, whole).mean()), 5), "prompt_accuracy": round(ours, 4),
        "accuracy_change_points": round(100 * (ours - theirs), 2),
        "accuracy_change_standard_error": round(error, 2),
        "images_marked_otherwise": int((change != 0).sum()),
    }  # fmt: skip


def traffic(reports: list[dict[str, Any]], images: int) -> Row:
    """Bytes that the rank with the most sends for one image, a step on average; seconds that ranks waited in all."""
    ranks = [[one["ranks"][rank] for one in reports] for rank in range(len(reports[0]["ranks"]))]
    sent = [sum((Counter(one["sent"]) for one in rank), Counter[str]()) for rank in ranks]
    most = max(sent, key=lambda kinds: kinds.total())
    return {
        "bytes_per_step_and_image": round(most.total() / images / STEPS),
        "bytes_by_kind": {kind: round(size / images / STEPS) for kind, size in sorted(most.items())},
        "waited_seconds": [round(sum(one["waited_seconds"] for one in rank), 1) for rank in ranks],
        "oldest_value_steps": max(one["oldest"] for rank in ranks for one in rank),
        "notes": sorted({note for one in reports for note in one["notes"]}),
    }


def setting(pipe: Any, count: int, batch: int) -> dict[str, Any]:
    return {
        "command": command(), "remark": REMARK, "steps": STEPS, "guidance_scale": GUIDANCE,
        "captions": count, "batch": batch, "seeds": f"{SEED} + number of the caption", "environment": environment(pipe),
    }  # fmt: skip


def known(file: Path, row: Row) -> bool:
    return any(key(one) == key(row) for one in read(file)["rows"])


def key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["ranks"], row["name"]


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}


def keep(file: Path, row: Row, facts: dict[str, Any]) -> None:
    rows = [one for one in read(file)["rows"] if key(one) != key(row)] + [row]
    text = json.dumps(facts | {"rows": rows}, indent=1) + "\n"
    output.write(file, lambda part: part.write_text(text, encoding="utf-8"))


def markdown(found: dict[str, Any]) -> str:
    """One table a model: each row against one device."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in found["rows"]):
        lines += ["", f"`{model}`", "", "| ranks | method | PSNR dB | SSIM | accuracy | change, points | kB sent |"]
        lines.append("|---:|---|---:|---:|---:|---:|---:|")
        rows = [row for row in found["rows"] if row["model"] == model]
        for row in sorted(rows, key=lambda row: (row["ranks"], row["name"])):
            lines.append(f"| {row['ranks']} | {row['name']} | {' | '.join(cells(row))} |")
    return "\n".join(lines[1:])


def cells(row: Row) -> tuple[str, ...]:
    if "refused" in row:
        return (f"refused: {row['refused']}", "", "", "", "")
    error = row["accuracy_change_standard_error"]
    change = f"{row['accuracy_change_points']:+.1f}" + (f" ± {error:.1f}" if error else "")
    sent = f"{row['bytes_per_step_and_image'] / 1e3:.1f}" if "bytes_per_step_and_image" in row else ""
    decibels = f"over {PSNR_CAP:.0f}" if row["psnr"] >= PSNR_CAP else f"{row['psnr']:.1f}"
    return decibels, f"{row['ssim']:.4f}", f"{row['prompt_accuracy']:.3f}", change, sent


if __name__ == "__main__":
    typer.run(main)
