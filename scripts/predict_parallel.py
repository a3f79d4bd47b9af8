"""Predicted speed-ups of the parallel methods on GPUs that were not measured, next to what the papers measured.

    python scripts/predict_parallel.py --json benchmarks/parallel-predictions.json
    python scripts/predict_parallel.py --json benchmarks/parallel-predictions.json --table    # prints it as Markdown

Bytes and operations are counted on models without weights. A step on one device is the papers' own; for sizes that no
paper gives it grows with the operations. Everything else is a prediction.
"""

from __future__ import annotations

import json as jsonlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from fastdiff import output
from fastdiff.anatomy import Anatomy
from fastdiff.bench.row import command
from fastdiff.parallel.planner import Site, alone, plan, trials
from fastdiff.parallel.rehearsal import Call
from fastdiff.pipelines.families import FAMILIES, recognise
from tests.parallel.published import A100

LINKS = {
    "SDXL": {"NVLink 300 GB/s": 300e9, "PCIe 24 GB/s": 24e9},
    "Flux": {"NVLink 450 GB/s": 450e9, "PCIe 24 GB/s": 24e9},
}
PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "published-speedups.json"


def sdxl() -> torch.nn.Module:
    return UNet2DConditionModel(
        sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
        layers_per_block=2, cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    )  # fmt: skip


def sdxl_calls(pixels: int) -> list[Call]:
    side = pixels // 8
    added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
    text = torch.empty(2, 77, 2048)
    return [
        ((torch.empty(2, 4, side, side), torch.empty(())), {"encoder_hidden_states": text, "added_cond_kwargs": added})
    ]


def flux() -> torch.nn.Module:
    return FluxTransformer2DModel(guidance_embeds=True)


def flux_calls(pixels: int) -> list[Call]:
    side = pixels // 16
    with torch.device("cpu"):  # places are looked at
        image = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side))
        text = torch.zeros(512, 3, dtype=torch.long)
    return [((), {
        "hidden_states": torch.empty(1, side * side, 64), "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768), "timestep": torch.empty(1), "guidance": torch.empty(1),
        "img_ids": image, "txt_ids": text,
    })]  # fmt: skip


# the model, its calls in a step, channels of the latents
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int], list[Call]], int]] = {
    "SDXL": (sdxl, sdxl_calls, 4), "Flux": (flux, flux_calls, 16),
}  # fmt: skip


def main(
    json: Annotated[Path, typer.Option(help="write the result here")],
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    table: Annotated[bool, typer.Option("--table", help="print a result as Markdown and predict nothing")] = False,
) -> None:
    if table:
        print(markdown(jsonlib.loads(json.read_text(encoding="utf-8"))["rows"]))
        return
    output.check([json], overwrite)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)
    papers = jsonlib.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = [row for name in MODELS for row in predicted(name, papers)]
    result = {
        "what": "PREDICTIONS for machines that were not measured; only published_seconds and published_speedup were "
        "measured, by the papers. Denoising alone; a rank's computation is its share of the operations and an overhead "
        "fitted to DistriFusion's table on A100 (assumed for Flux on H100 too).",
        "command": command(),
        "overhead_seconds_a_step": {"fixed": A100.fixed, "per_megapixel": round(A100.per_pixel * 2**20, 6)},
        "rows": rows,
    }  # fmt: skip
    output.write(json, lambda part: part.write_text(jsonlib.dumps(result, indent=1) + "\n", encoding="utf-8"))


def predicted(name: str, papers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    build, arguments, channels = MODELS[name]
    paper = next(p for p in papers if p["model"] == name and "seconds" in p)
    rows, base = [], math.nan
    with torch.device("meta"):
        anatomy = recognise(build().eval(), "denoiser", FAMILIES)
        for pixels in (1024, 2048, 3840):
            one = alone(anatomy, arguments(pixels))
            for devices in (2, 4, 8):
                tried = trials(anatomy, arguments(pixels), devices, one)
                base = one.stale.flops if pixels == 1024 else base
                seconds = paper["seconds"].get(str(pixels), {}).get("1")
                step = (seconds or paper["seconds"]["1024"]["1"] * one.stale.flops / base) / paper["steps"]
                for link, rate in LINKS[name].items():
                    site = Site(
                        devices, rate, 1e-5, paper["steps"], channels * (pixels // 8) ** 2 * 2, _weights(anatomy),
                        one_step=step, overhead=A100.of(pixels**2),
                    )  # fmt: skip
                    for found in plan(one, tried, site).rows:
                        given = {
                            "model": name,
                            "machine": paper["machine"],
                            "link": link,
                            "pixels": pixels,
                            "devices": devices,
                        }
                        origin = "published" if seconds else "published at 1024, times operations"
                        row = (
                            given
                            | {"one_device_step_seconds": round(step, 4), "one_device_origin": origin}
                            | found.to_dict()
                        )
                        rows.append(_rounded(row) | _measured(papers, found.method, row, link))
                print(name, pixels, devices, file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Speed-ups by size, devices and link; the paper's figure in brackets."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| model | pixels | devices | link | " + " | ".join(f"`{m}`" for m in methods) + " |"]
    lines.append("|---|---:|---:|---|" + "---:|" * len(methods))
    cases: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        paper = f" ({row['published_speedup']})" if "published_speedup" in row else ""
        cell = f"{row['predicted_speedup']:.2f}{paper}" if row.get("predicted_speedup") else "-"
        cases.setdefault(tuple(row[k] for k in ("model", "pixels", "devices", "link")), {})[row["method"]] = cell
    for case, cells in cases.items():
        lines.append("| " + " | ".join([*map(str, case), *(cells.get(m, "-") for m in methods)]) + " |")
    return "\n".join(lines)


def _measured(papers: list[dict[str, Any]], method: str, row: dict[str, Any], link: str) -> dict[str, Any]:
    """The paper's figure for the same model, method, size and number of devices, on the link it had."""
    for paper in papers:
        table = paper.get("seconds", {}).get(str(row["pixels"]), {})
        seconds = table.get(str(row["devices"]))
        # two devices of DistriFusion are the two halves of guidance
        known = "cfg" if paper["method"] == "distrifusion" and row["devices"] == 2 else paper["method"]
        if seconds and link.startswith("NVLink") and (paper["model"], known) == (row["model"], method):
            return {"published_seconds": seconds, "published_speedup": round(table["1"] / seconds, 2)}
    return {}


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def _weights(anatomy: Anatomy) -> int:
    return sum(tensor.nbytes for tensor in anatomy.denoiser.parameters())


if __name__ == "__main__":
    typer.run(main)
