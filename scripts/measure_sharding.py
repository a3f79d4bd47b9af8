"""What a rank holds and sends where weights are shared out, and what streaming from the host's memory costs.

A Flux of random weights, 1 GB as float32 (its pictures say nothing), is loaded and run by real processes over gloo:
all of it; all of it, of which a rank keeps its share then; and its share alone. Memory is what of a process is resident
beyond what was before it loaded, with the pages of files that it looks at; the most is what the system saw. Then one
process runs it plainly, streamed by `fastdiff.stream`, and by diffusers' group offloading, in turns. On a CPU nothing
is gained by streaming: what is measured is its overhead.

    python scripts/measure_sharding.py [--json benchmarks/parallel-sharding.json]
"""

from __future__ import annotations

import ctypes
import gc
import json as jsonlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.studio.ranks import launch
from fastdiff.weights import nbytes
from tests import tiny

TIMEOUT, STEPS, ROUNDS = 600, 2, 3
CASES: dict[str, tuple[dict[str, Any], bool]] = {  # and whether a rank reads its share alone
    "patch, shard, shares are read": ({"method": "patch", "shard": "blocks"}, True),
    "patch, shard, all is read first": ({"method": "patch", "shard": "blocks"}, False),
    "pipefusion": ({"method": "pipefusion"}, False),
    "patch": ({"method": "patch"}, False),
}


def pipeline() -> Any:
    """The tiny Flux pipeline around a denoiser of 24 blocks, about 1 GB."""
    pipe = tiny.make("flux")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=8, num_single_layers=16, attention_head_dim=32,
            num_attention_heads=24, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
        ).eval()  # fmt: skip
    return pipe


def status(name: str) -> int:
    """Bytes that the system counts for this process: VmRSS, what is resident now, or VmHWM, the most of it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def afresh() -> int:
    """What is resident, from which on the most is counted anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def draw(pipe: Any, **more: Any) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    arguments = tiny.arguments("flux", STEPS) | {"true_cfg_scale": 1.0, "negative_prompt": None} | more
    pipe(**arguments)
    return (time.perf_counter() - began) / STEPS


def together(model: Path, folder: Path) -> None:
    """Each case in all ranks, from loading on."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    draw(tiny.make("flux"))  # what libraries hold
    rows = []
    for name, (asked, by_shares) in CASES.items():
        settings, bare = asked | {"timeout": TIMEOUT}, afresh()
        began = time.perf_counter()
        pipe: Any = fastdiff.load(model, parallel=settings if by_shares else None)
        loaded = time.perf_counter() - began
        loading = status("VmHWM") - bare
        blocks, here = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks], list[int]()
        with fastdiff.accelerate(pipe, parallel=settings) as fast:
            draw(pipe)  # what is mapped from files is there now
            between, drawing = status("VmRSS") - bare, afresh() - bare
            hooks = [b.register_forward_pre_hook(lambda *_, here=here: here.append(status("VmRSS"))) for b in blocks]
            seconds = draw(pipe)
            for hook in hooks:
                hook.remove()
            drawing = max(status("VmHWM") - bare, drawing)
            sent = {kind: count // STEPS for kind, count in fast.report.ranks[fast.rank]["sent"].items()}
        rows.append({
            "name": name, "rank": fast.rank, "resident_most_while_loading": loading, "resident_between_steps": between,
            "resident_at_blocks": max(here) - bare, "resident_most_of_a_run": drawing, "bytes_sent_a_step": sent,
            "seconds_to_load": round(loaded, 2), "seconds_a_step": round(seconds, 3),
        })  # fmt: skip
        del pipe, blocks, hooks, fast
    (folder / f"{dist.get_rank()}.json").write_text(jsonlib.dumps(rows), encoding="utf-8")


def alone(model: Path) -> list[dict[str, Any]]:
    """Medians of rounds in turns, in one process."""
    torch.set_num_threads(1)
    plain, streamed, grouped = (cast(Any, fastdiff.load(model)) for _ in range(3))
    fastdiff.stream(streamed)
    apply_group_offloading(
        grouped.transformer, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    ways = {"plain": plain, "fastdiff.stream": streamed, "diffusers group offloading": grouped}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, pipe in ways.items():
            one = draw(pipe)
            seconds[name] += [one] if turn else []
    return [{"name": name, "seconds_a_step": round(statistics.median(some), 3)} for name, some in seconds.items()]


def main(json: Annotated[Path, typer.Option(help="file to write")] = Path("benchmarks/parallel-sharding.json")) -> None:
    pipe = pipeline()
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    sizes = [nbytes(block) for block in blocks]
    found: dict[str, Any] = {
        "command": command(), "remark": __doc__ and __doc__.splitlines()[0], "environment": environment(pipe),
        "weights": nbytes(pipe.transformer), "weights_of_blocks": sum(sizes), "largest_block": max(sizes), "ranks": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        pipe.save_pretrained(model)
        del pipe, blocks
        for number in (2, 4):
            code = launch(number, TIMEOUT, together, model, Path(folder))
            if code:
                raise SystemExit(code)
            files = [Path(folder) / f"{rank}.json" for rank in range(number)]
            found["ranks"][str(number)] = [row for file in files for row in jsonlib.loads(file.read_text())]
        found["one_process"] = alone(model)
    text = jsonlib.dumps(found, indent=1) + "\n"
    output.write(json, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
