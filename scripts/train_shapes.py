"""Train the embedded models: autoencoder, text encoder, UNet, DiT.

    python scripts/train_shapes.py --folder ~/shapes-training              # everything, in order
    python scripts/train_shapes.py --folder ~/shapes-training --only unet  # one denoiser (run two side by side)

Everything is seeded and scheduled by step count; a stopped run goes on from the checkpoints in the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from training import data, dit, text, unet, vae
from training.denoiser import Examples, Start


def main(
    folder: Annotated[Path, typer.Option(help="checkpoints, rendered scenes and the trained pipelines go here")],
    only: Annotated[str, typer.Option(help="vae, text, unet or dit; earlier stages are made if missing")] = "",
    scenes: Annotated[int, typer.Option(min=1000, help="how many scenes to render")] = 40000,
    channels: Annotated[int, typer.Option(min=4, help="latent channels")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; one is fastest for models this small")] = 1,
    unet_steps: Annotated[int, typer.Option(min=1)] = unet.STEPS,
    dit_steps: Annotated[int, typer.Option(min=1)] = dit.STEPS,
) -> None:
    if only not in ("", "vae", "text", "unet", "dit"):
        raise typer.BadParameter(f"{only!r} is no stage; choose vae, text, unet or dit", param_hint="--only")
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    images = data.training_images(folder / "images.npy", scenes)
    autoencoder = vae.run(folder, images, channels)
    if only == "vae":
        return
    tokenizer, encoder = text.run(folder)
    if only == "text":
        return
    examples = Examples.load(data.latents(autoencoder, images, folder / "latents.pt"))
    start = Start(folder, examples, autoencoder, tokenizer, encoder)
    if only in ("", "unet"):
        unet.run(start, unet_steps)
    if only in ("", "dit"):
        dit.run(start, dit_steps)


if __name__ == "__main__":
    typer.run(main)
