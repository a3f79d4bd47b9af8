"""Stable Diffusion XL: the plain picture and the accelerated one, side by side.

Needs a GPU and the model from the hub (7 GB). NOT RUN by the tests: here only its config is checked.
"""

import time

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from PIL import Image

import fastdiff

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
CONFIG = {
    "cache": {
        "method": "deepcache",
        "interval": 3,
        "warmup_steps": 3,  # the layout is decided first
        "cooldown_steps": 1,
        "predictor": "adams_bashforth",  # DeepCache itself reuses; a straight line through two values is closer
    },
}


def main() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL, torch_dtype=torch.float16, variant="fp16").to("cuda")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # the better solver comes first

    def draw() -> tuple[Image.Image, float]:
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(7)
        image = pipe("a lighthouse on a cliff, oil painting", num_inference_steps=30, generator=generator).images[0]
        return image, time.perf_counter() - start

    draw()  # warms up
    plain, before = draw()
    with fastdiff.accelerate(pipe, CONFIG) as fast:
        quick, after = draw()
        print(fast.report)
    both = Image.new("RGB", (plain.width * 2, plain.height))
    both.paste(plain, (0, 0))
    both.paste(quick, (plain.width, 0))
    both.save("sdxl.png")
    print(f"{before:.2f} s plain, {after:.2f} s with the cache")


if __name__ == "__main__":
    main()
