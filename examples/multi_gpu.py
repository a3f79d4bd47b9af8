"""One picture on several devices: torchrun --nproc-per-node 2 examples/multi_gpu.py

Every rank loads the model and makes the same call; rank 0 saves. As it stands it draws with an embedded model, on CPUs
too. Put a hub id in MODEL for a real one; that was NOT RUN here.
"""

import torch

import fastdiff

MODEL = "shapes-unet"
CONFIG = {"parallel": {"method": "patch"}}  # exact; distrifusion and pcpp trade exactness for less waiting


def main() -> None:
    pipe = fastdiff.load(MODEL)
    with fastdiff.accelerate(pipe, CONFIG) as fast:
        generator = torch.Generator("cpu").manual_seed(1)  # the same noise on every rank
        image = pipe("a small green ring", num_inference_steps=8, guidance_scale=3, generator=generator).images[0]
        if fast.rank == 0:
            print(fast.report)
            image.save("multi_gpu.png")


if __name__ == "__main__":
    main()
