"""What a quantized UNet of random weights takes on disk and in memory; writes benchmarks/quant-memory.json.

    python scripts/measure_quant_memory.py

Each pipeline is saved, then loaded and run by a process of its own. `weights_mb` is what the layers that get quantized
hold there after a picture, as the kernel keeps them. `process_mb` is what the process holds (VmRSS) beyond one that
loaded the same pipeline with a UNet of next to nothing: the layers that stay float and what kernels keep are in it.
Linux only.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastdiff
from fastdiff import output
from fastdiff.bench.row import command, environment
from fastdiff.quant.layer import QLayer

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "quant-memory.json"
SCHEMES = {"w8a16": 3.9, "w8a8": 3.9, "w4a16": 7.0, "w4a8": 7.0}  # and what we hope to divide by


def main(
    file: Annotated[Path, typer.Option("--output", "-o", help="Where the numbers go.")] = OUTPUT,
    look: Annotated[str, typer.Option(help="Load this directory, draw, and print what the process holds.")] = "",
) -> None:
    torch.set_num_threads(1)
    if look:
        print(json.dumps(held(look)))
        return
    with tempfile.TemporaryDirectory() as folder:
        nothing, plain = Path(folder) / "nothing", Path(folder) / "float"
        pipe = saved(nothing, (32, 32, 32))
        pipe = saved(plain, (160, 320, 640))
        whole = sum(p.numel() for p in pipe.unet.parameters())
        base, resident = process(nothing)["process"], process(plain)["process"]
        rows: list[dict[str, Any]] = [
            {"scheme": "float32", "disk_mb": mb(disk(plain)), "process_mb": mb(resident - base)}
        ]
        for scheme, hoped in SCHEMES.items():
            target = Path(folder) / scheme
            pipe = fastdiff.load(str(plain))
            pipe.set_progress_bar_config(disable=True)
            report = fastdiff.quantize(pipe, {"quant": scheme})
            fastdiff.save(pipe, target)
            taken = process(target)
            kept = disk(plain) - report.before  # of layers that stay float
            rows.append({
                "scheme": scheme, "hoped": hoped, "kernels": sorted({layer.kernel for layer in report.layers}),
                "float_mb": mb(report.before), "disk_mb": mb(disk(target) - kept), "weights_mb": mb(taken["weights"]),
                "disk_ratio": round(report.before / (disk(target) - kept), 2),
                "weights_ratio": round(report.before / taken["weights"], 2),
                "process_mb": mb(taken["process"] - base),
                "process_ratio": round((resident - base) / (taken["process"] - base), 2),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        told = {
            "command": command(), "parameters": whole, "process_without_mb": mb(base),
            "environment": environment(pipe), "rows": rows,
        }  # fmt: skip
    output.write(file, lambda part: part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))


def saved(folder: Path, channels: tuple[int, ...]) -> Any:
    """The embedded pipeline with another UNet of the same inputs."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    pipe: Any = fastdiff.load("shapes-unet")
    pipe.unet = UNet2DConditionModel.from_config(
        dict(pipe.unet.config) | {
            "block_out_channels": channels, "layers_per_block": 2, "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        }
    ).eval()  # fmt: skip
    pipe.save_pretrained(folder)
    return pipe


def process(folder: Path) -> dict[str, int]:
    own = [sys.executable, __file__, "--look", str(folder)]
    return json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def held(folder: str) -> dict[str, int]:
    """Bytes of quantized weights and of this process after a picture; memory given back is the system's first."""
    import ctypes

    pipe = fastdiff.load(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", num_inference_steps=1, output_type="latent")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    weights = sum(size(layer) for layer in pipe.unet.modules() if isinstance(layer, QLayer))
    return {"weights": weights, "process": int(status.split("VmRSS:")[1].split()[0]) * 1024}


def size(layer: QLayer) -> int:
    """Bytes that a layer holds: its buffers, and what its kernel packed."""
    packed = layer._packed if isinstance(layer._packed, tuple) else ()
    blocked = [t for t in packed if isinstance(t, torch.Tensor) and t.is_mkldnn]
    return sum(t.nbytes for t in layer.buffers()) + sum(int(torch.ops.mkldnn._nbytes(t)) for t in blocked)


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "unet").rglob("*.safetensors"))


def mb(count: int) -> float:
    return round(count / 1e6, 1)


if __name__ == "__main__":
    typer.run(main)
