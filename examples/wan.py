"""Wan 2.1 text to video: guidance calls the transformer twice a step; both calls are cached, each with its own values.

Needs a GPU and the model from the hub. NOT RUN by the tests: here only its config is checked.
"""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import fastdiff

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CONFIG = {
    "cache": {
        "method": "seacache",
        "site": "output",  # one remembered tensor a call, of the size of the latents; "stack" is nearer, and larger
        "threshold": 0.25,
        "warmup_steps": 5,
        "cooldown_steps": 1,
    },
}


def main() -> None:
    pipe = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16).to("cuda")
    with fastdiff.accelerate(pipe, CONFIG) as fast:
        frames = pipe("a cat walks on the grass", num_frames=81, num_inference_steps=50, height=480, width=832).frames[
            0
        ]
        print(fast.report)
    export_to_video(frames, "wan.mp4", fps=16)


if __name__ == "__main__":
    main()
