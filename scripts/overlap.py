"""How much of the exchange each parallel method hides: two ranks over a real link of limited rate.

Run by benchmarks/overlap.sh, which puts each rank into a network namespace of its own, joined by a veth pair, and which
skips where that is not allowed. First both ranks compute over the link as it is; then it is limited (tc tbf) so that
all that a step sends takes `share` of what a step computes. Methods are measured in
interleaved rounds, the medians of rounds are written.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import fastdiff
from fastdiff import output
from fastdiff.bench.row import environment

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "parallel-overlap.json"
TIMEOUT = 900.0
STEPS, WARMUP = 14, 1
LATE = range(3, 13)  # after the warm-up; whole cycles of ParaStep; not the last step, which sends nothing on
PORTION = 0.3
METHODS: dict[str, dict[str, Any]] = {
    "patch": {"method": "patch"},
    "distrifusion": {"method": "distrifusion", "warmup_steps": WARMUP},
    "pcpp": {"method": "pcpp", "portion": PORTION, "warmup_steps": WARMUP},
    "distrifusion int8": {"method": "distrifusion", "codec": "int8", "warmup_steps": WARMUP},
    "parastep": {"method": "parastep", "order": 2, "warmup_steps": WARMUP},
}
REMARK = (
    "seconds are those of two ranks on one machine with other jobs: medians of rounds; a step of one device is "
    "measured while the other rank waits. waited is what a rank stood still for others in a step, mean of the ranks. "
    "This shows what is hidden, not what a cluster would gain"
)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    size: Annotated[int, typer.Option(min=64, help="Pixels of the picture's sides.")] = 320,
    share: Annotated[
        list[float] | None, typer.Option(help="What a step sends, in seconds, over what it computes.")
    ] = None,
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the numbers go.")] = OUTPUT,
) -> None:
    """One of the two ranks."""
    import datetime

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    pipe: Any = fastdiff.load("shapes-unet")
    pipe.set_progress_bar_config(disable=True)
    began, found = os.getloadavg(), {}
    run(pipe, size, METHODS["patch"])
    found["unlimited"] = measured(pipe, size, rounds)
    free = found["unlimited"]  # patch computes the same, but cannot be told from its hundreds of small messages
    full = torch.tensor(free["patch"]["bytes"] / free["distrifusion"]["computed_seconds"], dtype=torch.float64)
    dist.broadcast(full, 0)
    for one in share or [0.5, 1.0, 2.0]:
        limit(float(full) / one)
        found[f"{one:g}"] = measured(pipe, size, rounds) | {"bytes_per_second": round(float(full) / one)}
    if dist.get_rank() == 0:
        write(pipe, size, rounds, found, [began, os.getloadavg()], file)
    dist.barrier()
    dist.destroy_process_group()


def limit(rate: float) -> None:
    """Bytes a second that this rank can send. A small bucket: what it holds is sent at once after each pause."""
    device = f"v{dist.get_rank()}"  # as overlap.sh names them
    tbf = ["tbf", "rate", f"{round(8 * rate)}bit", "burst", f"{round(20_000 + rate / 250)}", "limit", "4mb"]
    subprocess.run(["tc", "qdisc", "replace", "dev", device, "root", *tbf], check=True)


def measured(pipe: Any, size: int, rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds of what `run` tells, by method; hidden shares are compared within a round."""
    told: dict[str, list[dict[str, Any]]] = {"one device": [], **{name: [] for name in METHODS}}
    for number in range(rounds):
        names = list(told)
        shift = number * len(names) // rounds  # nobody is always first
        for name in (*names[shift:], *names[:shift]):
            dist.barrier()
            told[name].append(run(pipe, size, METHODS.get(name)))
    return {name: median(runs, told) for name, runs in told.items()}


def run(pipe: Any, size: int, method: dict[str, Any] | None, images: int = 1) -> dict[str, Any]:
    """So many pictures at once; means of late steps: seconds, waited (mean of the ranks), bytes by kind of rank 0."""
    if method is None and dist.get_rank():
        return {}
    lever = method | {"devices": 2, "timeout": TIMEOUT} if method else None
    marks: list[tuple[float, float, float, Counter[str]]] = []
    exposed: Counter[str] = Counter()
    with fastdiff.accelerate(pipe, parallel=lever) as fast:

        def tick(index: int) -> None:
            traffic = fast.crew.bus.traffic if fast.crew else None
            waited, sent = (traffic.waited, Counter(traffic.sent)) if traffic else (0.0, Counter[str]())
            marks.append((time.perf_counter(), time.process_time(), waited, sent))

        fast.clock.on_tick.append(tick)
        noise = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", "generator": noise}
        many = {"height": size, "width": size, "num_images_per_prompt": images}
        pipe("a large red circle above a small blue square", **many, **call)
        first, last = marks[LATE.start - 1], marks[LATE.stop - 1]
        seconds, busy, waited = ((b - a) / len(LATE) for a, b in zip(first[:3], last[:3], strict=True))
        for sent, stood in zip(fast.report.spans[::2], fast.report.spans[1::2], strict=True):
            exposed[sent.layer.split()[0]] += (stood.end - stood.start) / len(LATE) * (stood.step in LATE)
        everyone = fast.crew.bus.tell((seconds, busy, waited)) if fast.crew else [(seconds, busy, waited)]
        by_kind = {kind: (last[3][kind] - first[3][kind]) / len(LATE) for kind in sorted(last[3])}
    seconds, busy, waited = (statistics.fmean(column) for column in zip(*everyone, strict=True))
    return {
        "step_seconds": seconds, "cpu_seconds": busy, "waited_seconds": waited, "computed_seconds": seconds - waited,
        "bytes": sum(by_kind.values()), "bytes_by_kind": by_kind,
        "waited_by_kind": {kind: round(value, 5) for kind, value in sorted(exposed.items())},
    }  # fmt: skip


def median(runs: list[dict[str, Any]], told: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    if not runs[0]:  # the rank that waits while the other is one device
        return {}
    found: dict[str, Any] = {"rounds": len(runs)}
    for name in ("step_seconds", "waited_seconds", "computed_seconds", "cpu_seconds"):
        values = [one[name] for one in runs]
        found[name] = round(statistics.median(values), 5)
        found[f"{name}_spread"] = [round(min(values), 5), round(max(values), 5)]
    found |= {name: runs[0][name] for name in ("bytes", "bytes_by_kind", "waited_by_kind")}
    pairs = list(zip(runs, told["patch"], strict=True))
    found["hidden_share"] = round(statistics.median(1 - a["waited_seconds"] / b["waited_seconds"] for a, b in pairs), 4)
    alone = [b["step_seconds"] / a["step_seconds"] for a, b in zip(runs, told["one device"], strict=True) if b]
    found["one_device_over_step"] = round(statistics.median(alone), 4) if alone else None
    return found


def formula(pipe: Any, size: int, portion: float | None) -> float:
    """Bytes of keys and values that a rank of two sends in a step: whole rows of its half, at each level."""
    latents = size // pipe.vae_scale_factor
    last = len(pipe.unet.down_blocks) - 1
    total = 0
    for name, module in pipe.unet.named_modules():
        if not hasattr(module, "to_k") or module.is_cross_attention:
            continue
        part, number = name.split(".")[0], name.split(".")[1]
        level = {"down_blocks": lambda k: k, "up_blocks": lambda k: last - k, "mid_block": lambda k: last}[part](
            int(number) if number.isdigit() else 0
        )
        side = latents >> level
        rows = math.ceil((1 if portion is None else portion) * (side // 2))
        total += 2 * module.to_k.out_features * rows * side * 2 * 4  # K and V, both halves of guidance, float32
    return total


def write(pipe: Any, size: int, rounds: int, found: dict[str, Any], loads: list[Any], file: Path) -> None:
    kv = {name: found["unlimited"][name]["bytes_by_kind"]["kv"] for name in ("distrifusion", "pcpp")}
    expected = {"distrifusion": formula(pipe, size, None), "pcpp": formula(pipe, size, PORTION)}
    claims = {
        "shares": {
            share: {
                "exchange_over_computation": round(
                    link["patch"]["waited_seconds"] / link["distrifusion"]["computed_seconds"], 3
                ),
                "distrifusion_hides": link["distrifusion"]["hidden_share"], "pcpp_hides": link["pcpp"]["hidden_share"],
            }
            for share, link in found.items() if share != "unlimited"
        },
        "distrifusion_should_hide": 0.85,
        "pcpp_share_of_keys_and_values": round(kv["pcpp"] / kv["distrifusion"], 4),
        "pcpp_share_by_formula": round(expected["pcpp"] / expected["distrifusion"], 4),
        "bytes_equal_formula": kv == expected,
    }  # fmt: skip
    told = {
        "command": f"benchmarks/overlap.sh --rounds {rounds} --size {size}", "remark": REMARK,
        "model": "shapes-unet", "size": size, "steps": STEPS, "late_steps": [LATE.start, LATE.stop - 1],
        "portion": PORTION, "warmup_steps": WARMUP, "ranks": 2,
        "load_before_and_after": [round(one[0], 1) for one in loads],
        "cores_allowed": len(os.sched_getaffinity(0)), "environment": environment(pipe), "claims": claims,
        "links": found,
    }  # fmt: skip
    output.write(file, lambda part: part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))
    print(json.dumps(claims))


if __name__ == "__main__":
    typer.run(main)
