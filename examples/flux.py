"""FLUX.1-dev: blocks are skipped while the first one changes little; model offloading keeps memory low.

Needs a GPU and the model from the hub (its licence must be accepted there). NOT RUN by the tests: here only its config
is checked.
"""

import torch
from diffusers import FluxPipeline

import fastdiff

MODEL = "black-forest-labs/FLUX.1-dev"
CONFIG = {
    "cache": {
        "method": "first_block",
        "threshold": 0.08,  # a place to start; measure on your prompts with `fastdiff bench`
        "warmup_steps": 2,
        "max_consecutive_cached": 3,
        "lagged": True,  # decide on the step before: the host does not wait for the device
    },
}


def main() -> None:
    pipe = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    fast = fastdiff.accelerate(pipe, CONFIG)
    for seed in range(4):
        generator = torch.Generator("cpu").manual_seed(seed)
        image = pipe("a tiny robot watering a plant", num_inference_steps=28, generator=generator).images[0]
        image.save(f"flux-{seed}.png")
        print(seed, fast.report)  # a threshold computes more steps for some seeds than for others
    fast.restore()


if __name__ == "__main__":
    main()
