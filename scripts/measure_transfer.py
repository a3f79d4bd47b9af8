"""How a shipped solver's plan does in runs that it was not fitted on: other guidance, sizes, quantized weights, a LoRA.

python scripts/measure_transfer.py shapes-unet -o benchmarks/solver-transfer-unet.json    about 15 minutes
Runs that are in the file are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from training.data import to_tensor  # beside this file

import fastdiff
from fastdiff.bench import prompts_for
from fastdiff.bench.measure import draw
from fastdiff.bench.metrics import psnr
from fastdiff.bench.row import command, environment
from fastdiff.bench.scenes import render, scenes
from fastdiff.config import Config
from fastdiff.pipelines.loading import call_defaults
from fastdiff.pipelines.solving.fitted import Fitted
from fastdiff.pipelines.solving.schedulers import solver, title

STOCK = {
    "shapes-unet": ("unipc", "unipc@karras", "dpm++", "dpm++@karras"),
    "shapes-dit": ("unipc@shift2", "unipc@shift3", "dpm++@shift2", "dpm++@shift3"),
}
FINE = 150  # steps of DPM++ 2M that stand for the converged picture
BATCH = 8
# pixels; the models are made for 64, and the transformer's table of places ends there
SIZES = {"shapes-unet": (48, 96), "shapes-dit": (32, 48)}
COLOUR, TUNED = "red", 400  # what the LoRA is fine-tuned on, and the steps of that
LORA = f"LoRA of {COLOUR} shapes"


def conditions(model: str, usual: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """What is said of a run, its arguments, and the quantization that is on."""
    yield "as fitted", usual, None
    for guidance in (1.5, 2.0, 4.5, 6.0, 7.5):
        yield f"guidance {guidance:g}", usual | {"guidance_scale": guidance}, None
    for size in SIZES[model]:
        yield f"{size} x {size} pixels", usual | {"height": size, "width": size}, None
    yield "w8a8 weights", usual, "w8a8"
    if model == "shapes-unet":
        yield LORA, usual, None


@contextmanager
def adapted(pipe: Any) -> Iterator[None]:
    """The UNet with a LoRA on its attention, fine-tuned on scenes of one colour."""
    from peft import LoraConfig

    torch.manual_seed(3)
    found = [
        scene for scene in scenes(11, 3_000, held_out=False) if {thing.colour for thing in scene.things} == {COLOUR}
    ]
    signal, empty = pipe.scheduler.alphas_cumprod, torch.rand(len(found)) < 0.1
    captions = ["" if left else scene.caption for scene, left in zip(found, empty.tolist(), strict=True)]
    with torch.no_grad():
        text = torch.cat([pipe.encode_prompt([caption], "cpu", 1, False)[0] for caption in captions])
        images = to_tensor(np.stack([render(scene) for scene in found]))
        clean = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    pipe.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    steps = torch.optim.AdamW([weight for weight in pipe.unet.parameters() if weight.requires_grad], 1e-3)
    for _ in range(TUNED):
        index, times = torch.randint(len(found), (16,)), torch.randint(len(signal), (16,))
        kept = signal[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean[index])
        noisy = kept.sqrt() * clean[index] + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean[index]
        torch.nn.functional.mse_loss(pipe.unet(noisy, times, text[index]).sample, velocity).backward()
        steps.step()
        steps.zero_grad()
    try:
        yield
    finally:
        pipe.unet.delete_adapters("default")


def main(
    model: Annotated[str, typer.Argument(help="shapes-unet or shapes-dit")],
    output: Annotated[Path, typer.Option("-o", "--output")],
    evaluations: Annotated[int, typer.Option(help="of the shipped plan")] = 10,
    prompts: Annotated[int, typer.Option(help="held-out captions")] = 16,
    run: Annotated[list[str] | None, typer.Option(help="only runs whose name begins so; repeatable")] = None,
) -> None:
    torch.set_num_threads(1)
    pipe = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    own, texts = pipe.scheduler, list(prompts_for(pipe, prompts, 0, None).texts)
    plan = Fitted(evaluations=evaluations).found(model)
    usual = {"guidance_scale": call_defaults(pipe)["guidance_scale"]}

    def drawn(steps: int, call: dict[str, Any], name: str | None = None) -> Any:
        pipe.scheduler = own if name is None else solver(name, own)
        size, guidance = {k: v for k, v in call.items() if k != "guidance_scale"}, call["guidance_scale"]
        chunks = [range(k, min(k + BATCH, len(texts))) for k in range(0, len(texts), BATCH)]
        made = [draw(partial(pipe, **size), [texts[i] for i in chunk], chunk, steps, guidance) for chunk in chunks]
        pipe.scheduler = own
        return np.concatenate(made)

    rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.exists() else []
    for what, call, quant in conditions(model, usual):
        if what in {row["what"] for row in rows} or not what.startswith(tuple(run or [""])):
            continue
        plain = drawn(FINE, call, "dpm++") if what == LORA else None
        with adapted(pipe) if what == LORA else nullcontext():
            with fastdiff.accelerate(pipe, quant=quant) if quant else nullcontext():
                goal = drawn(FINE, call, "dpm++")
                stock = {title(n): float(psnr(drawn(evaluations, call, n), goal).mean()) for n in STOCK[model]}
            with fastdiff.accelerate(pipe, Config(solver={"method": "fitted", "plan": plan}), quant=quant):
                fitted = float(psnr(drawn(evaluations, call), goal).mean())
        best = max(stock, key=lambda name: stock[name])
        rows.append({"what": what, "fitted": round(fitted, 2), "stock": round(stock[best], 2), "stock_name": best})
        if plain is not None:
            rows[-1]["to_pictures_without"] = round(float(psnr(plain, goal).mean()), 2)
        print(rows[-1], flush=True)
        found = {
            "model": model, "evaluations": evaluations, "prompts": prompts, "converged": f"DPM++ 2M, {FINE} steps",
            "rows": rows, "command": command(), "environment": environment(pipe),
        }  # fmt: skip
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
